"""The link within a process: order, isolation, bounded waits with names, close."""

import threading

import torch

from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import InProcessLink
from kit import refused


def link(capacity=4, seconds=300):
    return InProcessLink(2, LinkTerms(capacity, seconds), torch.device("cpu"))


def packet(number, payload=None):
    return Packet(PacketKind.TRAIN, number, torch.ones(2) if payload is None else payload, torch.ones(1))


def test_first_in_first_out():
    one = link()
    for number in range(3):
        one.send(packet(number))
    assert one.depth() == 3
    assert [one.receive().number for _ in range(3)] == [0, 1, 2]
    assert one.depth() == 0


def test_neither_side_can_alter_the_others_activations():
    one, payload = link(), torch.zeros(2)
    one.send(packet(0, payload))
    payload.add_(1)
    arrived = one.receive().payload
    assert torch.equal(arrived, torch.zeros(2))
    arrived.sub_(1)
    assert torch.equal(payload, torch.ones(2))


def test_tensors_arrive_as_from_a_wire_without_graph_and_with_plain_strides():
    one, weight = link(), torch.ones(2, 3, 4, 5, requires_grad=True)
    sent = (weight * 2).contiguous(memory_format=torch.channels_last)
    one.send(Packet(PacketKind.TRAIN, 0, sent, sent.transpose(1, 2)))
    packet = one.receive()
    for arrived, expected in ((packet.payload, sent), (packet.target, sent.transpose(1, 2))):
        assert torch.equal(arrived, expected)
        assert arrived.is_contiguous()
        assert not arrived.requires_grad


def test_counters_count_payload_and_target_once():
    one = link()
    one.send(packet(0))
    one.receive()
    counted = one.counters
    assert (counted.packets, counted.payload_bytes_forward, counted.payload_bytes_backward) == (1, 12, 0)


def test_a_wait_for_a_packet_says_who_waited_for_whom():
    one = link(seconds=0.1)
    one.send(packet(7))
    one.receive()
    with refused("wait-too-long", LinkError, "stage 3 waited 0.1 s for a packet (last: 7) from stage 2", "of 0.1 s"):
        one.receive()


def test_a_wait_for_room_says_who_waited_for_whom():
    one = link(capacity=1, seconds=0.1)
    one.send(packet(0))
    with refused("wait-too-long", LinkError, "stage 2 waited 0.1 s for room to send packet 1 to stage 3", "of 0.1 s"):
        one.send(packet(1))


def test_closing_wakes_whoever_waits():
    one, errors = link(seconds=60), []

    def wait():
        try:
            one.receive()
        except LinkError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    one.close()
    waiting.join()
    assert errors == ["stage 3 waited for a packet (last: None) from stage 2, which closed the link"]


def test_what_was_sent_before_closing_still_arrives():
    one = link()
    one.send(packet(0))
    one.close()
    one.close()
    assert one.receive().number == 0
