"""What the planner expects of an emulated pipeline whose durations are drawn."""

import random
from dataclasses import replace

import pytest

from benchmarks.predicted import MessageCost, predicted_period
from benchmarks.workload import Workload

RANKS, M, STEPS, CAPACITY, F, B = 3, 4, 3, 2, 10.0, 20.0
EXTRA = 0.5
"""What a pass takes beyond its sleep."""


def factors(rank, number):
    draw = random.Random(f"{rank} {number}")
    return draw.expovariate(1.0), draw.expovariate(1.0)


WORK = Workload(RANKS, F, B, 4, STEPS * M, M, STEPS, CAPACITY)
FREE = MessageCost(0.0, 0.0, 0.0)


def durations(rank, number):
    forward, backward = factors(rank, number)
    return F * forward + EXTRA, B * backward + EXTRA


def test_decoupled_with_drawn_durations_is_a_tandem_queue():
    """Against the recursion of a tandem of servers with finite queues, written without the simulation."""
    passes = [{rank: (F + EXTRA, B + EXTRA, 0.0)} for rank in range(RANKS)]
    count = WORK.fill + STEPS * M
    free, taken, ends = [0.0] * RANKS, [[0.0] * count for _ in range(RANKS)], []
    for packet in range(count):
        arrived = 0.0
        for rank in range(RANKS):
            forward, backward = durations(rank, packet - WORK.fill)
            taken[rank][packet] = max(free[rank], arrived)
            ready = taken[rank][packet] + forward
            if rank < RANKS - 1 and packet >= CAPACITY:
                ready = max(ready, taken[rank + 1][packet - CAPACITY])
            arrived, free[rank] = ready, ready + backward
        ends.append(free[-1])
    expected = (ends[-1] - ends[WORK.fill - 1]) / (STEPS * M)
    assert predicted_period("decoupled", passes, FREE, WORK, factors) == pytest.approx(expected)


def test_gpipe_with_drawn_durations():
    """A grid of forwards, a flush, a grid of backwards, per step."""
    passes = [{rank: (F + EXTRA, B + EXTRA, 0.0)} for rank in range(RANKS)]
    clock, ends = [0.0] * RANKS, []
    for step in range(STEPS + 1):
        numbers = [step * M + n - M for n in range(M)]
        arrived = dict.fromkeys(numbers, 0.0)
        for rank, number in ((r, n) for r in range(RANKS) for n in numbers):
            clock[rank] = arrived[number] = max(clock[rank], arrived[number]) + durations(rank, number)[0]
        for rank, number in ((r, n) for r in reversed(range(RANKS)) for n in numbers):
            clock[rank] = arrived[number] = max(clock[rank], arrived[number]) + durations(rank, number)[1]
        ends.append(list(clock))
    expected = max(last - first for first, last in zip(ends[0], ends[-1], strict=True)) / (STEPS * M)
    assert predicted_period("gpipe", passes, FREE, WORK, factors) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["zero_bubble", "zbv", "interleaved_1f1b", "1f1b", "deepspeed"])
def test_all_sleeps_are_drawn(kind):
    """Twice the factors on every rank is twice the time, if there is nothing but sleeps."""
    stages = RANKS * (1 if kind in {"1f1b", "deepspeed"} else 2)
    share = RANKS / stages
    split = kind in {"zero_bubble", "zbv"}
    halves = (B * share / 2, B * share / 2) if split else (B * share, 0.0)
    passes = [{stage: (F * share, *halves) for stage in range(stages)}]

    def period(by):
        return predicted_period(kind, passes, FREE, replace(WORK, micro_batches=6), lambda *_: (by, by))

    assert period(2.0) == pytest.approx(2 * period(1.0))
