"""Streams, fences, links, clocks and random states on a GPU."""

import random
import threading

import pytest
import torch
from joined_stages import waiting_forbidden
from on_gpu import CUDA_ONLY, DEVICE, GPU, ON_CUDA, busy

from decoupled_pp.core.channels import LinkTerms
from decoupled_pp.core.device import Clock, Fence, RandomStream, on_device, own_stream, seeded
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import InProcessLink

pytestmark = GPU

SIZE, PACKETS = 1 << 16, 60


class Producer:
    """Sends packets full of their number, and then writes over whatever memory it can get."""

    def __init__(self, link):
        self.link, self.random, self.stream = link, random.Random(1), own_stream(DEVICE)

    def send(self, number):
        with self.stream:
            busy(self.random.random() ** 3 * 2)
            hidden = torch.full((SIZE,), float(number), device=DEVICE)
            target = torch.full((SIZE,), number, device=DEVICE)
            self.link.send(Packet(PacketKind.TRAIN, number, hidden, target))
            hidden.fill_(-1.0)  # the link has a copy of its own
            del hidden, target
            for _ in range(3):  # would take the memory of a packet that is not held for its reader
                torch.full((SIZE,), -7.0, device=DEVICE)
                torch.full((SIZE,), -7, device=DEVICE)


class Consumer:
    """Reads packets late."""

    def __init__(self, link):
        self.link, self.random, self.stream, self.read = link, random.Random(2), own_stream(DEVICE), []

    def receive(self):
        with self.stream:
            packet = self.link.receive()
            busy(self.random.random() ** 3 * 2)
            self.read.append(torch.stack([packet.payload.double().mean(), packet.target.double().mean()]))

    def check(self):
        numbers = torch.arange(len(self.read), dtype=torch.float64)
        with self.stream:
            found = torch.stack(self.read).cpu()
        assert torch.equal(found, torch.stack([numbers, numbers], 1))


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_link_between_streams_of_one_thread(capacity):
    link = InProcessLink(0, LinkTerms(capacity, 30), DEVICE)
    producer, consumer = Producer(link), Consumer(link)
    for number in range(PACKETS):
        producer.send(number)
        consumer.receive()
    consumer.check()


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_link_between_streams_of_two_threads(capacity):
    link = InProcessLink(0, LinkTerms(capacity, 30), DEVICE)
    failures = []

    def produce():
        try:
            producer = Producer(link)  # own_stream: in the thread that uses it
            for number in range(PACKETS):
                producer.send(number)
        except Exception as error:
            failures.append(error)
            link.close()

    thread = threading.Thread(target=produce)
    thread.start()
    consumer = Consumer(link)
    for _ in range(PACKETS):
        consumer.receive()
    thread.join()
    assert failures == []
    consumer.check()


def test_a_fence_orders_streams():
    with own_stream(DEVICE):
        busy(20)
        late = torch.full((SIZE,), 3.0, device=DEVICE)
        fence = Fence(DEVICE)
    with own_stream(DEVICE):
        fence.wait(late)
        seen = late.sum()
        assert float(seen) == 3.0 * SIZE


def test_a_fence_holds_up_the_host():
    with own_stream(DEVICE):
        busy(20)
        fence = Fence(DEVICE)
        fence.synchronize()
        assert not ON_CUDA or torch.cuda.current_stream(DEVICE).query()


@CUDA_ONLY
def test_a_stream_of_ones_own_is_left_again():
    before = torch.cuda.current_stream(DEVICE)
    stream = own_stream(DEVICE)
    for _ in range(2):  # entered once per packet
        with stream:
            assert torch.cuda.current_stream(DEVICE) != before
        assert torch.cuda.current_stream(DEVICE) == before


def test_a_clock_marks_the_devices_work_in_order():
    with own_stream(DEVICE):
        clock = Clock(DEVICE)
        marks = [clock.mark()]
        for _ in range(3):
            busy(2)
            marks.append(clock.mark())
        first = clock.seconds(marks)
        busy(2)
        second = clock.seconds([marks[-1], clock.mark()])
    assert first == sorted(first)
    assert len(set(first)) == 4
    assert second[0] == first[-1]  # one flush goes on where the other ended
    assert second[1] > second[0]


def test_marking_does_not_wait():
    with own_stream(DEVICE):
        clock = Clock(DEVICE)
        torch.ones(1, device=DEVICE)
        with waiting_forbidden(DEVICE):
            marks = [clock.mark() for _ in range(10)]
        assert len(clock.seconds(marks)) == 10


def draw():
    return torch.rand(9), torch.rand(9, device=DEVICE)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_random_stream_goes_on_and_comes_back():
    stream, again = RandomStream(3, DEVICE), RandomStream(3, DEVICE)
    with stream:
        draw()
    state = stream.state
    assert (state.device.type, state.dtype) == ("cpu", torch.uint8)
    with stream:
        second = draw()
    again.state = state
    with again:
        assert same(draw(), second)


def test_a_random_stream_leaves_the_generators_alone_and_does_not_wait():
    before = torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)
    with own_stream(DEVICE), waiting_forbidden(DEVICE):
        busy(5)
        with RandomStream(3, DEVICE):
            draw()
    assert same(before, (torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)))


@pytest.mark.parametrize("device", [None, DEVICE])
def test_seeding_leaves_the_generators_alone(device):
    torch.rand(1, device=DEVICE)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)
    with seeded(5, device):
        inside = torch.rand(4, device=DEVICE)
    assert same(before, (torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)))
    torch.rand(3, device=DEVICE)
    with seeded(5, device):
        assert torch.equal(torch.rand(4, device=DEVICE), inside)


def test_a_batch_comes_through_page_locked_memory():
    batch = torch.arange(1 << 20)
    with own_stream(DEVICE), waiting_forbidden(DEVICE):
        busy(5)
        moved = [on_device(batch + number, DEVICE) for number in range(5)]
        moved = [tensor - number for number, tensor in enumerate(moved)]
    assert all(torch.equal(tensor.cpu(), batch) for tensor in moved)
