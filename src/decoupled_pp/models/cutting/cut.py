"""Chooses where to cut a list of layers: pure functions on numbers.

A cut is written as its boundaries: the index of the first layer of every stage, then the number of layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

from decoupled_pp.core.errors import UsageError

Fits: TypeAlias = Callable[[int, int, int], bool]
"""fits(stage, first, end): True if a device has room for layers first..end-1 as this stage."""


def minmax_cut(
    costs: Sequence[float],  # of every layer
    stages: int,
    closing: Sequence[Sequence[float]] | None,  # of every stage but the last, for every layer; infinite: no cut here
    *,
    speeds: Sequence[float] | None = None,  # of the device of every stage; its costs are divided by it
    fits: Fits | None = None,
) -> tuple[int, ...]:
    """Cut so that the costliest stage, which sets the pace of the pipeline, costs as little as possible. Exact.

    The cost of a stage is the sum of its layers' costs plus the closing cost behind its last layer (its critic); the
    last stage has no critic. Ties are broken by the least sum of squared stage costs (the most even cut), then by the
    smallest boundaries.
    """
    layers = len(costs)
    _check_stages(layers, stages)
    _check_costs(costs, stages, closing)
    _check_speeds(speeds, stages)
    sums = list(accumulate(costs, initial=0.0))

    def stage_cost(stage: int, first: int, end: int) -> float:
        critic = 0.0
        if closing is not None and end < layers:
            critic = closing[stage][end - 1]
        if fits is not None and not math.isinf(critic) and not fits(stage, first, end):
            return math.inf
        speed = 1.0 if speeds is None else speeds[stage]
        return (sums[end] - sums[first] + critic) / speed

    least, _ = _best_cut(layers, stages, stage_cost, max)
    if math.isinf(least):
        raise _no_cut(stages, bounded=fits is not None)

    # The second pass chooses among all cuts whose costliest stage is as cheap as `least`.
    def square_within_least(stage: int, first: int, end: int) -> float:
        cost = stage_cost(stage, first, end)
        return cost * cost if cost <= least else math.inf

    _, boundaries = _best_cut(layers, stages, square_within_least, operator.add)
    return boundaries


def uniform_cut(layers: int, stages: int) -> tuple[int, ...]:
    """Return the boundaries of stages with equally many layers.

    Where the layers do not divide evenly, later stages get one more: the last stage has no critic.
    """
    _check_stages(layers, stages)
    return tuple(layers * stage // stages for stage in range(stages + 1))


def listed_cut(sizes: Sequence[int], layers: int, stages: int) -> tuple[int, ...]:
    """Return the boundaries for a given number of layers per stage."""
    _check_stages(layers, stages)
    listed = list(sizes)
    fault = None
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in listed):
        fault = "must hold whole numbers of layers, each at least 1"
    elif len(listed) != stages:
        fault = f"names {len(listed)} stages but `stages` is {stages}; make them agree"
    elif sum(listed) != layers:
        fault = f"adds up to {sum(listed)} layers but the network has {layers}; make them agree"
    if fault is not None:
        raise UsageError(f"`cut` {listed} {fault}", code="bad-cut", key="cut")
    return tuple(accumulate(listed, initial=0))


def _best_cut(
    layers: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Cut layers 0..n-1 into K = `stages` runs with the least total cost, folded with `join` from the last run on.

    Dynamic programming: best[k][i] = min over j of join(cost(K-k, i, j), best[k-1][j]) is the least cost of the last k
    stages if they begin at layer i; the first of them, stage K-k, has layers i..j-1. Time O(K n^2). Of equal cuts the
    one with the smallest boundaries is returned.
    """
    best: list[list[float]] = [[math.inf] * (layers + 1) for _ in range(stages + 1)]
    choice: list[list[int]] = [[layers] * (layers + 1) for _ in range(stages + 1)]
    for first in range(stages - 1, layers):
        best[1][first] = join(cost(stages - 1, first, layers), 0.0)
    for count in range(2, stages + 1):
        for first in range(stages - count, layers - count + 1):
            # Each of the count - 1 stages behind needs a layer, as did each before.
            for end in range(first + 1, layers - count + 2):
                value = join(cost(stages - count, first, end), best[count - 1][end])
                if value < best[count][first]:
                    best[count][first] = value
                    choice[count][first] = end
    boundaries = [0]
    for count in range(stages, 0, -1):
        boundaries.append(choice[count][boundaries[-1]])
    return best[stages][0], tuple(boundaries)


def _check_stages(layers: int, stages: int) -> None:
    if stages < 1:
        raise UsageError(f"`stages` is {stages}; it must be at least 1", code="bad-stages", key="stages")
    if stages > layers:
        raise UsageError(
            f"`stages` is {stages} but the network has only {layers} layers; use fewer stages or split the network "
            "finer",
            code="too-few-layers",
            key="stages",
        )


def _check_costs(costs: Sequence[float], stages: int, closing: Sequence[Sequence[float]] | None) -> None:
    fault = None
    if any(not math.isfinite(cost) or cost < 0 for cost in costs):
        fault = f"layer costs {list(costs)} must be finite and not negative; measure again"
    elif closing is not None and len(closing) != stages - 1:
        fault = f"closing costs are given for {len(closing)} stages; give them for all {stages} but the last"
    for row in closing or ():
        if len(row) != len(costs):
            fault = f"there are {len(row)} closing costs for {len(costs)} layers; give one for every layer"
        elif any(math.isnan(cost) or cost < 0 for cost in row):
            fault = f"closing costs {list(row)} must not be negative or NaN; measure again"
    if fault is not None:
        raise UsageError(fault, code="bad-costs")


def _check_speeds(speeds: Sequence[float] | None, stages: int) -> None:
    if speeds is None:
        return
    fault = None
    if len(speeds) != stages:
        fault = f"has {len(speeds)} numbers for {stages} stages; give one for each"
    elif any(not 0 < speed < math.inf for speed in speeds):
        fault = f"{list(speeds)} must hold finite numbers above 0"
    if fault is not None:
        raise UsageError(f"`balance.speeds` {fault}", code="bad-speeds", key="balance.speeds")


def _no_cut(stages: int, *, bounded: bool) -> UsageError:
    if bounded:
        return UsageError(
            f"no cut into {stages} stages fits the devices' memory (`balance.memory`); use more stages, a smaller "
            "`data.batch_size`, or `training.checkpoint_activations`",
            code="no-cut-fits-memory",
            key="balance.memory",
        )
    return UsageError(
        f"no cut into {stages} stages avoids the layers after which no critic can be built; use fewer stages or "
        "another `critic.kind`",
        code="no-cut-for-critic",
        key="stages",
    )
