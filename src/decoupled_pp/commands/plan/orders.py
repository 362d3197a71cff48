"""Orders in which the ranks of a pipeline schedule compute: stages, micro-batches, passes. No torch.

`gpipe`, `1f1b`, `interleaved_1f1b`, `zero_bubble` and `zbv` are the orders of `torch.distributed.pipelining` (the tests
compare them); `deepspeed` is that of DeepSpeed's `TrainSchedule`, which computes in the order of 1F1B.

    F forward   B whole backward   I input's gradient   W weights' gradient   C critic and loss   S optimizer step
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from decoupled_pp.core.errors import UsageError

PIPELINES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "deepspeed")
"""Pipelines with a backward pass between ranks and a flush before every optimizer step."""

TWO_STAGES = ("interleaved_1f1b", "zero_bubble", "zbv")
"""Those of `PIPELINES` with two stages on every rank."""

SPLIT = ("zero_bubble", "zbv")
"""Those of `PIPELINES` that compute the gradients of inputs and weights apart."""


class Operation(NamedTuple):
    """One piece of compute.

    Attributes:
        kind: F, B, I, W, C or S (see above).
        stage: Index of the stage.
        micro_batch: Index of the micro-batch (of the optimizer step for S).
    """

    kind: str
    stage: int
    micro_batch: int


Order = list[Operation]


def stages_per_rank(kind: str) -> int:
    """Returns how many stages every rank of a strategy holds."""
    return 2 if kind in TWO_STAGES else 1


def rank_of(kind: str, stage: int, ranks: int) -> int:
    """Returns the rank that holds a stage: round robin, or for `zbv` up the ranks and down again."""
    if kind == "zbv" and stage >= ranks:
        return 2 * ranks - 1 - stage
    return stage % ranks


def pipeline_order(kind: str, ranks: int, micro_batches: int) -> list[Order]:
    """Returns the operations of every rank in one optimizer step, in order (S left out).

    Raises:
        UsageError: The strategy is not in `PIPELINES`, or torch refuses so many micro-batches.
    """
    if kind not in PIPELINES:
        raise UsageError(
            f"strategy {kind!r} is not a pipeline with a flush; choose from {', '.join(PIPELINES)}",
            code="unknown-strategy",
            key="strategy",
        )
    if ranks < 1 or micro_batches < 1:
        raise UsageError(
            f"{ranks} ranks and {micro_batches} micro-batches must each be at least 1", code="option-out-of-range"
        )
    make: dict[str, Callable[[int, int, int], Order]] = {
        "gpipe": _gpipe,
        "1f1b": _one_forward_one_backward,
        "deepspeed": _one_forward_one_backward,
        "interleaved_1f1b": _interleaved,
        "zero_bubble": _zero_bubble,
        "zbv": _zero_bubble_v,
    }
    if kind == "1f1b" and micro_batches < ranks:
        raise UsageError(
            f"1f1b takes at least as many micro-batches as ranks: {micro_batches} for {ranks}; use more",
            code="schedule-does-not-fit",
        )
    return [make[kind](rank, ranks, micro_batches) for rank in range(ranks)]


def _gpipe(rank: int, ranks: int, micro_batches: int) -> Order:
    return [Operation(kind, rank, number) for kind in "FB" for number in range(micro_batches)]


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Order:
    """Starts with p - r forwards on rank r, then takes one backward and one forward in turn."""
    order: Order = []
    ahead = min(ranks - rank, micro_batches)
    order += [Operation("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append(Operation("B", rank, number))
        if ahead + number < micro_batches:
            order.append(Operation("F", rank, ahead + number))
    return order


class _Counters:
    """Appends operations; every kind of every stage counts its own micro-batches."""

    def __init__(self) -> None:
        self.order: Order = []
        self._next: defaultdict[tuple[str, int], int] = defaultdict(int)

    def add(self, kind: str, stage: int) -> None:
        """Appends the next micro-batch of this kind and stage."""
        self.order.append(Operation(kind, stage, self._next[kind, stage]))
        self._next[kind, stage] += 1

    def left(self, kind: str, than: str, stage: int) -> int:
        """Returns by how many micro-batches `kind` lags behind `than`."""
        return self._next[than, stage] - self._next[kind, stage]


def _micro_batches_per_round(ranks: int, micro_batches: int) -> int:
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        raise UsageError(
            f"interleaved schedules take a multiple of {rounds} micro-batches (rounds of {ranks} ranks), "
            f"not {micro_batches}",
            code="schedule-does-not-fit",
        )
    return micro_batches // rounds


def _interleaved(rank: int, ranks: int, micro_batches: int) -> Order:
    return _loops(rank, ranks, micro_batches, split=False)


def _zero_bubble(rank: int, ranks: int, micro_batches: int) -> Order:
    return _loops(rank, ranks, micro_batches, split=True)


def _loops(rank: int, ranks: int, micro_batches: int, *, split: bool) -> Order:
    """Orders stages `rank` and `rank + ranks`, a round of micro-batches at a time (Narayanan et al. 2021, 2104.04473).

    With `split`, the backward passes go to the inputs only, and the weights' gradients follow `rank` operations later
    (ZB1P of Qi et al. 2023, 2401.10241, as torch builds it).
    """
    local = 2
    size = _micro_batches_per_round(ranks, micro_batches)
    passes = local * micro_batches
    hops = (1 if split else 2) * (ranks - 1 - rank)
    ahead = min((local - 1) * size + hops, passes)
    counters = _Counters()
    weights: list[int] = []  # stages whose weight gradients are due, in the order of their backward passes
    for position in range(passes + ahead):
        if position < passes:
            counters.add("F", position // size % local * ranks + rank)
        if position >= ahead:
            stage = (local - 1 - (position - ahead) // size % local) * ranks + rank
            counters.add("I" if split else "B", stage)
            weights.append(stage)
            if split and position - ahead >= rank:
                counters.add("W", weights.pop(0))
    for stage in weights if split else ():
        counters.add("W", stage)
    return counters.order


def _zero_bubble_v(rank: int, ranks: int, micro_batches: int) -> Order:  # noqa: C901 - a loop per phase
    """Orders stages `rank` (on the way up) and `2 p - 1 - rank` (on the way down): ZBV of Qi et al. 2023, 2401.10241.

    torch builds it for at least 2 p - 1 micro-batches and leaves out those that do not exist.
    """
    built = max(2 * ranks - 1, micro_batches)
    up = rank
    down = 2 * ranks - 1 - rank
    counters = _Counters()

    def add(*passes: tuple[str, int]) -> None:
        for kind, stage in passes:
            counters.add(kind, stage)

    for _ in range(2 * (ranks - rank) - 1):
        add(("F", up))
    for _ in range(rank):
        add(("F", down), ("F", up))
    for _ in range(ranks - rank):
        add(("F", down), ("I", down), ("W", down))
    forwards_up = 2 * ranks - 1 - rank  # as many forward passes are done by now
    forwards_down = ranks
    while forwards_down < forwards_up or forwards_up < built:
        if forwards_up < built:
            add(("F", up))
            forwards_up += 1
        add(("I", up), ("W", up), ("F", down), ("I", down), ("W", down))
        forwards_down += 1
    for _ in range(rank):
        add(("I", up), ("I", down))
    for _ in range(ranks - rank):
        add(("I", up), ("W", up))
    for stage in (down, up):
        for _ in range(counters.left("W", "I", stage)):
            add(("W", stage))
    return [operation for operation in counters.order if operation.micro_batch < micro_batches]
