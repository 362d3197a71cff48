"""The link between two ranks: packets arrive as they were sent, whatever their tensors; counters; errors."""

import time

import pytest
import torch

from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple, payload_bytes
from decoupled_pp.core.topology import Topology
from decoupled_pp.links import join_world
from kit import check_text
from ranks import PATIENCE, launch

CPU = torch.device("cpu")
SLOW_BOUND = 3.0
"""Seconds; the slow consumer takes a third of it for each packet, so four packets outlast it."""


def packets():
    """One of everything; the last training batch is smaller, and another form follows."""
    torch.manual_seed(5)
    payloads = [
        torch.randn(4, 3),
        torch.randn(4, 3).bfloat16(),
        (torch.randn(4, 2), torch.rand(4, 4) > 0.5, torch.tensor(3, dtype=torch.int16)),
        torch.randn(8, 3).t(),  # not contiguous
        torch.randn(4, 6)[:, ::2],
        torch.empty(0, 3),
        torch.randn(1, 3),
    ]
    made = [Packet(PacketKind.TRAIN, n, payload, torch.arange(4)) for n, payload in enumerate(payloads)]
    made.insert(
        3, Packet(PacketKind.EVALUATE, 3, torch.randn(2, 3, dtype=torch.float64), (torch.ones(2), torch.ones(2)))
    )
    made.insert(4, Packet(PacketKind.EVALUATION_END, 3))
    return [*made, Packet(PacketKind.SAVE, 7), Packet(PacketKind.END, 7)]


def same(ours, theirs):
    return type(ours) is type(theirs) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(as_tuple(ours), as_tuple(theirs), strict=True)
    )


def test_packets_arrive_as_they_were_sent(tmp_path):
    sender, receiver = launch(_exchange, size=2, folder=tmp_path)
    carried = sum(payload_bytes(packet.payload) + payload_bytes(packet.target) for packet in packets())
    count = len(packets())
    assert receiver.value["same"] == [True] * count
    assert sender.value == {"packets": count, "payload": carried, "back": 0}
    assert receiver.value["payload back"] == 0
    assert receiver.value["control back"] == 8 * (count + 1)  # a credit each, and a goodbye


def test_a_wait_for_a_packet_says_who_waited_for_whom(tmp_path):
    _, receiver = launch(_wait_in_vain, size=2, folder=tmp_path)
    check_text("wait-too-long", receiver.value, "stage 1 (rank 1)", "(last: 0) from stage 0 (rank 0)", "of 1 s")


def test_the_first_packet_may_take_one_bound_for_every_stage_before(tmp_path):
    """Each of them may compile on it."""
    *_, last = launch(_wait_for_the_first, size=3, folder=tmp_path)
    check_text("wait-too-long", last.value, "stage 2 (rank 2)", "(last: None) from stage 1 (rank 1)", "of 2 s")


def test_a_packet_of_another_size_waits_one_bound_for_each_packet_before_it(tmp_path):
    """A resize needs an empty link, and a healthy consumer may take the bound for every packet in it."""
    sender, receiver = launch(_resize_behind_a_slow_consumer, size=2, folder=tmp_path)
    assert sender.value > SLOW_BOUND
    assert receiver.value == [4, 4, 4, 4, 400, 0]


def test_different_plans_are_refused_on_both_ranks(tmp_path):
    for result in launch(_disagree, size=2, folder=tmp_path, may_fail=True):
        assert result.error.startswith("UsageError: ")
        assert "run different plans or settings; start all ranks alike" in result.error


def _connect(seconds=PATIENCE, plan="one plan", capacity=2):
    world = join_world(PATIENCE)
    topology = Topology(world.size, world.size)
    return world, *world.connect(world.channel(), topology, CPU, plan, LinkTerms(capacity, seconds))


def _exchange():
    _, inlet, outlet = _connect()
    if outlet is not None:
        for packet in packets():
            outlet.send(packet)
        outlet.close()
        counted = outlet.counters
        return {
            "packets": counted.packets,
            "payload": counted.payload_bytes_forward,
            "back": counted.payload_bytes_backward + counted.control_bytes_backward,
        }
    found = []
    for sent in packets():
        packet = inlet.receive()
        found.append(
            (packet.kind, packet.number) == (sent.kind, sent.number)
            and same(packet.payload, sent.payload)
            and same(packet.target, sent.target)
        )
    inlet.close()
    counted = inlet.counters
    return {
        "same": found,
        "payload back": counted.payload_bytes_backward,
        "control back": counted.control_bytes_backward,
    }


def _resize_behind_a_slow_consumer():
    """The sender: how long it took to send the large packet; the receiver: the sizes it got."""
    _, inlet, outlet = _connect(seconds=SLOW_BOUND, capacity=4)
    if outlet is None:
        sizes = []
        for _ in range(6):
            sizes.append(inlet.receive().samples)
            time.sleep(SLOW_BOUND / 3)
        inlet.close()
        return sizes
    for number in range(4):
        outlet.send(Packet(PacketKind.TRAIN, number, torch.ones(4, 9), torch.ones(4)))
    start = time.monotonic()
    outlet.send(Packet(PacketKind.TRAIN, 4, torch.ones(400, 9), torch.ones(400)))
    seconds = time.monotonic() - start
    outlet.send(Packet(PacketKind.END, 5))
    outlet.close()
    return seconds


def _wait_for_the_first():
    world, inlet, outlet = _connect(seconds=1)
    text = None
    if outlet is None:
        with pytest.raises(LinkError) as caught:
            inlet.receive()
        text = str(caught.value)
    world.channel().gather("over", 0, PATIENCE)
    for end in (inlet, outlet):
        if end is not None:
            end.close()
    return text


def _wait_in_vain():
    world, inlet, outlet = _connect(1)
    control = world.channel()
    if outlet is not None:
        outlet.send(Packet(PacketKind.TRAIN, 0, torch.ones(1), torch.ones(1)))
        control.gather("waited", True, PATIENCE)
        outlet.close()
        return None
    inlet.receive()
    with pytest.raises(LinkError) as caught:
        inlet.receive()
    control.gather("waited", True, PATIENCE)
    inlet.close()
    return str(caught.value)


def _disagree():
    world = join_world(PATIENCE)
    world.connect(world.channel(), Topology(2, 2), CPU, f"plan of rank {world.rank}", LinkTerms(2, PATIENCE))
