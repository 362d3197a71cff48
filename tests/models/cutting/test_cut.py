"""Law 10: the chosen cut is the brute-force one."""

import itertools
import math
import random

import pytest

from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.cutting.cut import listed_cut, minmax_cut, uniform_cut
from kit import refused


def stage_costs(costs, boundaries, closing):
    stages = [sum(costs[first:end]) for first, end in itertools.pairwise(boundaries)]
    for stage, end in enumerate(boundaries[1:-1]):
        stages[stage] += closing[stage][end - 1] if closing else 0
    return stages


def brute_force(costs, stages, closing):
    def rank(boundaries):
        found = stage_costs(costs, boundaries, closing)
        return max(found), sum(cost * cost for cost in found), boundaries

    inner = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(((0, *cut, len(costs)) for cut in inner), key=rank)


@pytest.mark.parametrize("with_closing", [False, True])
def test_equals_brute_force(with_closing):
    """Whole numbers, so that sums are exact and ties are many."""
    draw = random.Random(int(with_closing))
    for _ in range(1500):
        layers = draw.randint(1, 9)
        costs = [draw.randint(0, 6) for _ in range(layers)]
        for stages in range(1, layers + 1):
            closing = [[draw.randint(0, 6) for _ in range(layers)] for _ in costs[1:stages]] if with_closing else None
            assert minmax_cut(costs, stages, closing) == brute_force(costs, stages, closing), (costs, stages, closing)


def test_equals_brute_force_on_seconds():
    draw = random.Random(0)
    for _ in range(300):
        layers = draw.randint(2, 9)
        costs = [draw.expovariate(1000) for _ in range(layers)]
        for stages in range(1, layers + 1):
            closing = [[draw.expovariate(1000) for _ in range(layers)] for _ in costs[1:stages]]
            found = max(stage_costs(costs, minmax_cut(costs, stages, closing), closing))
            best = max(stage_costs(costs, brute_force(costs, stages, closing), closing))
            assert math.isclose(found, best, rel_tol=1e-9)


def test_the_last_layer_has_no_closing_cost():
    assert minmax_cut([1, 1, 1, 1], 2, [[0, 0, 0, 1000]]) == (0, 2, 4)


def test_infinite_closing_costs_forbid_a_cut():
    assert minmax_cut([1, 1, 1, 9], 2, [[1, math.inf, math.inf, 0]]) == (0, 1, 4)
    with refused("no-cut-for-critic", UsageError, "3 stages"):
        minmax_cut([1, 1, 1, 9], 3, [[1, math.inf, math.inf, 0]] * 2)


def test_a_large_case_is_quick():
    boundaries = minmax_cut([1.0] * 120, 12, [[0.5] * 120] * 11)
    assert max(stage_costs([1.0] * 120, boundaries, [[0.5] * 120] * 11)) == 10.5


@pytest.mark.parametrize("cut", [lambda: minmax_cut([1, 2], 3, None), lambda: uniform_cut(2, 3)])
def test_more_stages_than_layers(cut):
    with refused("too-few-layers", UsageError, "3", "2 layers"):
        cut()


@pytest.mark.parametrize("costs", [[1.0, math.nan], [1.0, -1.0], [math.inf, 1.0]])
def test_bad_costs(costs):
    with refused("bad-costs", UsageError, "layer costs"):
        minmax_cut(costs, 1, None)


def test_uniform():
    assert uniform_cut(6, 3) == (0, 2, 4, 6)
    assert uniform_cut(5, 2) == (0, 2, 5)
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            sizes = [end - first for first, end in itertools.pairwise(uniform_cut(layers, stages))]
            assert sum(sizes) == layers
            assert max(sizes) - min(sizes) <= 1
            assert sizes[-1] == max(sizes)


def test_listed():
    assert listed_cut([1, 3, 2], 6, 3) == (0, 1, 4, 6)


@pytest.mark.parametrize(
    ("sizes", "stages", "part"),
    [
        ([1, 2], 2, "adds up to 3 layers but the network has 6"),
        ([3, 3], 3, "names 2 stages but `stages` is 3"),
        ([0, 6], 2, "each at least 1"),
        ([2.5, 3.5], 2, "whole numbers"),
    ],
)
def test_listed_refusals(sizes, stages, part):
    with refused("bad-cut", UsageError, part):
        listed_cut(sizes, 6, stages)
