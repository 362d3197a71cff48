"""Where to cut a list of layers: pure functions on numbers.

A cut is written as its boundaries: the index of the first layer of every stage, then the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

from decoupled_pp.core.errors import UsageError


def _check_stages(layers: int, stages: int) -> None:
    if stages < 1:
        raise UsageError(f"stages is {stages}; it must be at least 1")
    if stages > layers:
        raise UsageError(
            f"stages is {stages} but the network has only {layers} layers; use fewer stages or split the network finer"
        )


def _check_costs(costs: Sequence[float], stages: int, closing: Sequence[Sequence[float]] | None) -> None:
    if any(not math.isfinite(cost) or cost < 0 for cost in costs):
        raise UsageError(f"layer costs {list(costs)} must be finite and not negative; measure again")
    if closing is not None and len(closing) != stages - 1:
        raise UsageError(f"closing costs of {len(closing)} stages for {stages}; give them for every stage but the last")
    for row in closing or ():
        if len(row) != len(costs):
            raise UsageError(f"{len(row)} closing costs for {len(costs)} layers; give one for every layer")
        if any(math.isnan(cost) or cost < 0 for cost in row):
            raise UsageError(f"closing costs {list(row)} must not be negative or NaN; measure again")


def _check_speeds(speeds: Sequence[float] | None, stages: int) -> None:
    if speeds is None:
        return
    if len(speeds) != stages:
        raise UsageError(f"speeds has {len(speeds)} numbers for {stages} stages; give one for each")
    if any(not 0 < speed < math.inf for speed in speeds):
        raise UsageError(f"speeds {list(speeds)} must be above 0, every one")


def _best_cut(
    layers: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Cut layers 0..n-1 into K = `stages` runs so that the costs, folded with `join` from the last on, are least.

    best[k][i] = min over j of join(cost(K-k, i, j), best[k-1][j]): what the last k stages cost at best if they begin at
    layer i; the first of them, stage K-k, is i..j-1. Time O(K n^2). Of equal cuts the one with the smallest boundaries
    is returned.
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
                    best[count][first], choice[count][first] = value, end
    boundaries = [0]
    for count in range(stages, 0, -1):
        boundaries.append(choice[count][boundaries[-1]])
    return best[stages][0], tuple(boundaries)


Fits: TypeAlias = Callable[[int, int, int], bool]
"""fits(stage, first, end): whether a device has room for layers first..end-1 as this stage."""


def minmax_cut(
    costs: Sequence[float],
    stages: int,
    closing: Sequence[Sequence[float]] | None,
    *,
    speeds: Sequence[float] | None = None,
    fits: Fits | None = None,
) -> tuple[int, ...]:
    """Cut so that the costliest stage, which sets the pace of the pipeline, costs as little as possible. Exact.

    A stage costs the sum of its layers plus the closing cost of its last layer (its critic); the last stage of all has
    no critic. Of several best cuts the one with the least sum of squared stage costs is taken (the most even), and of
    those the one with the smallest boundaries.

    Args:
        costs: Cost of every layer (seconds or parameters).
        stages: Number of stages.
        closing: For every stage but the last, the cost of its critic after every layer; infinite where a cut is
            impossible. None for no critics.
        speeds: Of the device of every stage, relative to each other: costs are divided by them. None: all alike.
        fits: Which stages have room on their device; None: all.

    Returns:
        The boundaries, `stages + 1` of them.

    Raises:
        UsageError: More stages than layers, bad costs or speeds, or no cut that is possible.
    """
    layers = len(costs)
    _check_stages(layers, stages)
    _check_costs(costs, stages, closing)
    _check_speeds(speeds, stages)
    sums = list(accumulate(costs, initial=0.0))

    def stage_cost(stage: int, first: int, end: int) -> float:
        critic = closing[stage][end - 1] if closing is not None and end < layers else 0.0
        if fits is not None and not math.isinf(critic) and not fits(stage, first, end):
            return math.inf
        return (sums[end] - sums[first] + critic) / (speeds[stage] if speeds is not None else 1.0)

    least, _ = _best_cut(layers, stages, stage_cost, max)
    if math.isinf(least):
        raise UsageError(
            f"no cut into {stages} stages fits the devices' memory; use more stages, a smaller micro-batch, or "
            "checkpoint_activations"
            if fits is not None
            else f"no cut into {stages} stages avoids the layers after which no critic can be built; "
            "use fewer stages or another critic.kind"
        )

    def square_within_least(stage: int, first: int, end: int) -> float:
        cost = stage_cost(stage, first, end)
        return cost * cost if cost <= least else math.inf

    _, boundaries = _best_cut(layers, stages, square_within_least, lambda one, other: one + other)
    return boundaries


def uniform_cut(layers: int, stages: int) -> tuple[int, ...]:
    """Boundaries of stages of equal length, give or take one layer; the last stage, without critic, is a longer one.

    Raises:
        UsageError: More stages than layers.
    """
    _check_stages(layers, stages)
    return tuple(layers * stage // stages for stage in range(stages + 1))


def listed_cut(sizes: Sequence[int], layers: int, stages: int) -> tuple[int, ...]:
    """Boundaries from the number of layers of every stage.

    Raises:
        UsageError: Not one size per stage, a size below 1, or another sum than the number of layers.
    """
    _check_stages(layers, stages)
    listed = list(sizes)
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in listed):
        raise UsageError(f"cut {listed} must hold whole numbers of layers, each at least 1")
    if len(listed) != stages:
        raise UsageError(f"cut {listed} names {len(listed)} stages but stages is {stages}; make them agree")
    if sum(listed) != layers:
        raise UsageError(f"cut {listed} adds up to {sum(listed)} layers but the network has {layers}; make them agree")
    return tuple(accumulate(listed, initial=0))
