"""Orders in which the ranks of a pipeline schedule compute: stages, micro-batches, passes. No torch.

`gpipe`, `1f1b`, `interleaved_1f1b`, `zero_bubble` and `zbv` are the orders of `torch.distributed.pipelining` (the tests
compare them); `deepspeed` is that of DeepSpeed's `TrainSchedule`, which computes in the order of 1F1B.

    F forward   B whole backward   I input's gradient   W weights' gradient   C critic and loss   S optimizer step
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

from decoupled_pp.core.errors import UsageError

PIPELINES = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "deepspeed")
"""Pipelines with a backward pass between ranks and a flush before every optimizer step."""

TWO_STAGES = ("interleaved_1f1b", "zero_bubble", "zbv")
"""Those of `PIPELINES` with two stages on every rank."""

SPLIT = ("zero_bubble", "zbv")
"""Those of `PIPELINES` that compute the gradients of inputs and weights apart."""


class Operation(NamedTuple):
    """One piece of compute."""

    kind: str  # F, B, I, W, C or S (see above)
    stage: int
    micro_batch: int  # the optimizer step for S


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

    UsageError says that the strategy is not in `PIPELINES`, or that torch refuses so many micro-batches.
    """
    if kind not in PIPELINES:
        raise UsageError(
            f"strategy {kind!r} is not a pipeline with a flush; choose from {', '.join(PIPELINES)}",
            code="unknown-strategy",
            key="strategy",
        )
    if kind == "1f1b" and micro_batches < ranks:
        raise UsageError(
            f"1f1b takes at least as many micro-batches as ranks: {micro_batches} for {ranks}; use more",
            code="schedule-does-not-fit",
        )
    if kind == "zbv":
        return [_zero_bubble_v(rank, ranks, micro_batches) for rank in range(ranks)]
    if kind in TWO_STAGES:
        return [_loops(rank, ranks, micro_batches, split=kind in SPLIT) for rank in range(ranks)]
    if kind == "gpipe":
        return [_in_turn(rank, micro_batches, micro_batches) for rank in range(ranks)]
    return [_in_turn(rank, min(ranks - rank, micro_batches), micro_batches) for rank in range(ranks)]


def _in_turn(stage: int, ahead: int, micro_batches: int) -> Order:
    """Starts with `ahead` forward passes (p - r on rank r for 1F1B, all for GPipe), then one backward, one forward."""
    order = [Operation("F", stage, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append(Operation("B", stage, number))
        if ahead + number < micro_batches:
            order.append(Operation("F", stage, ahead + number))
    return order


class _Counters:
    """Appends operations; every kind of every stage counts its own micro-batches."""

    def __init__(self) -> None:
        self.order: Order = []
        self.next: defaultdict[tuple[str, int], int] = defaultdict(int)

    def add(self, *passes: tuple[str, int]) -> None:
        for kind, stage in passes:
            self.order.append(Operation(kind, stage, self.next[kind, stage]))
            self.next[kind, stage] += 1


def _loops(rank: int, ranks: int, micro_batches: int, *, split: bool) -> Order:
    """Orders stages `rank` and `rank + ranks`, a round of micro-batches at a time (Narayanan et al. 2021, 2104.04473).

    With `split`, the backward passes go to the inputs only, and the weights' gradients follow `rank` operations later
    (ZB1P of Qi et al. 2023, 2401.10241, as torch builds it).
    """
    rounds = max(1, micro_batches // ranks)
    if micro_batches % rounds:
        raise UsageError(
            f"interleaved schedules take a multiple of {rounds} micro-batches (rounds of {ranks} ranks), "
            f"not {micro_batches}",
            code="schedule-does-not-fit",
        )
    size = micro_batches // rounds
    passes = 2 * micro_batches
    hops = (1 if split else 2) * (ranks - 1 - rank)
    ahead = min(size + hops, passes)
    counters = _Counters()
    weights: deque[int] = deque()  # stages whose weight gradients are due, in the order of their backward passes
    for position in range(passes + ahead):
        if position < passes:
            counters.add(("F", position // size % 2 * ranks + rank))
        if position >= ahead:
            stage = (1 - (position - ahead) // size % 2) * ranks + rank
            counters.add(("I" if split else "B", stage))
            if split:
                weights.append(stage)
                if position - ahead >= rank:
                    counters.add(("W", weights.popleft()))
    counters.add(*(("W", stage) for stage in weights))
    return counters.order


def _zero_bubble_v(rank: int, ranks: int, micro_batches: int) -> Order:
    """Orders stages `rank` (on the way up) and `2 p - 1 - rank` (on the way down): ZBV of Qi et al. 2023, 2401.10241.

    torch builds it for at least 2 p - 1 micro-batches and leaves out those that do not exist.
    """
    built = max(2 * ranks - 1, micro_batches)
    up = rank
    down = 2 * ranks - 1 - rank
    counters = _Counters()
    counters.add(*[("F", up)] * (2 * (ranks - rank) - 1))
    counters.add(*[("F", down), ("F", up)] * rank)
    counters.add(*[("F", down), ("I", down), ("W", down)] * (ranks - rank))
    while counters.next["F", down] < counters.next["F", up] or counters.next["F", up] < built:
        if counters.next["F", up] < built:
            counters.add(("F", up))
        counters.add(("I", up), ("W", up), ("F", down), ("I", down), ("W", down))
    counters.add(*[("I", up), ("I", down)] * rank)
    counters.add(*[("I", up), ("W", up)] * (ranks - rank))
    for stage in (down, up):
        late = counters.next["I", stage] - counters.next["W", stage]
        counters.add(*[("W", stage)] * late)
    return [operation for operation in counters.order if operation.micro_batch < micro_batches]
