"""The feed: which packets come in which order, where a resumed run starts, and how a requested stop ends one."""

import pytest
import torch

from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import PacketKind
from decoupled_pp.data import as_source
from decoupled_pp.pipeline.feed import Feed, Itinerary

T, E, V, S, X = "train", "evaluate", "evaluation end", "save", "end"
NAMES = dict(zip(PacketKind, (T, E, V, S, X), strict=True))


class Numbered(BatchSource):
    """Batch n holds the number n; without a length it is endless."""

    def __init__(self, length=None):
        self.length = length

    def batches(self, start=0):
        number = start
        while self.length is None or number < self.length:
            yield torch.tensor([[float(number)]]), torch.tensor([number])
            number += 1


def packets(itinerary, *, validation=True, train=True, stop=lambda: False):
    held_out = Numbered(2) if validation else None
    feed = Feed(Numbered() if train else None, held_out, itinerary, torch.device("cpu"), stop)
    seen = [feed.receive()]
    while seen[-1].kind is not PacketKind.END:
        seen.append(feed.receive())
    return seen


def kinds(seen):
    return [NAMES[packet.kind] for packet in seen]


def test_training_then_evaluation_then_the_end():
    seen = packets(Itinerary(3))
    assert kinds(seen) == [T, T, T, E, E, V, X]
    assert [packet.number for packet in seen] == [0, 1, 2, 3, 3, 3, 3]
    assert [packet.payload.item() for packet in seen[:5]] == [0, 1, 2, 0, 1]
    assert [packet.target.item() for packet in seen[:5]] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("itinerary", "expected"),
    [
        (Itinerary(2, accumulate=2), [T, T, T, T, X]),
        (Itinerary(2, save=True), [T, T, S, X]),
        (Itinerary(4, save=True, save_every=2), [T, T, S, T, T, S, X]),
        (Itinerary(3, save=True, save_every=2), [T, T, S, T, S, X]),
        (Itinerary(3, save_every=1), [T, T, T, X]),
        (Itinerary(2, start=2, save=True), [X]),
    ],
)
def test_without_evaluation(itinerary, expected):
    assert kinds(packets(itinerary, validation=False)) == expected


@pytest.mark.parametrize(
    ("itinerary", "expected"),
    [
        (Itinerary(4, validate_every=2), [T, T, E, E, V, T, T, E, E, V, X]),
        (Itinerary(3, validate_every=2), [T, T, E, E, V, T, E, E, V, X]),
        (Itinerary(1, validation_batches=1), [T, E, V, X]),
        (Itinerary(2, validate_every=1, save=True, save_every=1), [T, S, E, E, V, T, S, E, E, V, X]),
        (Itinerary(2, start=2), [E, E, V, X]),
    ],
)
def test_with_evaluation(itinerary, expected):
    assert kinds(packets(itinerary)) == expected


def test_what_was_trained_is_saved_before_it_is_evaluated():
    assert kinds(packets(Itinerary(2, save=True))) == [T, T, S, E, E, V, X]


@pytest.mark.parametrize("fault", [Numbered(0), "broken"])
def test_a_fault_in_the_held_out_data_is_found_before_anything_is_trained(fault):
    class Broken(BatchSource):
        def batches(self, start=0):
            raise UsageError("there is no held-out batch", code="no-held-out-batch")
            yield

    held_out = Broken() if fault == "broken" else fault
    feed = Feed(Numbered(), held_out, Itinerary(3, save=True), torch.device("cpu"))
    with pytest.raises(UsageError) as caught:
        feed.receive()
    assert caught.value.code == "no-held-out-batch"


def test_an_iterator_that_can_be_read_once_loses_no_batch():
    held_out = as_source(iter(list(Numbered(3).batches())))
    feed = Feed(Numbered(), held_out, Itinerary(1), torch.device("cpu"))
    seen = [feed.receive() for _ in range(5)]
    assert [(NAMES[packet.kind], packet.target.item()) for packet in seen[1:4]] == [(E, 0), (E, 1), (E, 2)]


def test_evaluation_alone_reads_no_training_data():
    assert kinds(packets(Itinerary(5, start=5), train=False)) == [E, E, V, X]


def test_a_resumed_run_goes_on_where_it_stopped():
    seen = packets(Itinerary(5, start=3, accumulate=2, save=True), validation=False)
    assert [(NAMES[packet.kind], packet.number) for packet in seen] == [
        (T, 6), (T, 7), (T, 8), (T, 9), (S, 10), (X, 10),
    ]  # fmt: skip
    assert [packet.payload.item() for packet in seen[:4]] == [6, 7, 8, 9]


def test_a_stop_is_honoured_between_steps_saved_and_not_evaluated():
    asked = iter([False, True])
    seen = packets(Itinerary(9, accumulate=2, validate_every=2, save=True), stop=lambda: next(asked))
    assert kinds(seen) == [T, T, T, T, S, X]


def test_without_checkpoints_a_stop_just_ends():
    assert kinds(packets(Itinerary(9), stop=lambda: True)) == [T, X]


def test_nothing_is_read_before_the_first_packet():
    class Forbidden(BatchSource):
        def batches(self, start=0):
            raise AssertionError("read too early")

    feed = Feed(Forbidden(), None, Itinerary(1), torch.device("cpu"))
    with pytest.raises(AssertionError, match="read too early"):
        feed.receive()


def test_packets_carry_no_graph():
    class Taught(Numbered):
        def batches(self, start=0):
            for payload, _ in super().batches(start):
                yield payload.requires_grad_(), payload * 2

    feed = Feed(Taught(), None, Itinerary(1), torch.device("cpu"))
    packet = feed.receive()
    assert not packet.payload.requires_grad
    assert not packet.target.requires_grad
