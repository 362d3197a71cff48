"""The benefit of depth, by hand."""

import pytest

from decoupled_pp.commands.depth import SAYS_NOTHING, Pair, goodness, measure
from decoupled_pp.core.reports import Exit, FinalScores


def pair(first, last, plain, losses=False):
    """A run of two exits beside plain backpropagation: accuracies, or losses."""
    scores = [(score, None) if losses else (1.0, score) for score in (first, last, plain)]
    return Pair((Exit(0, *scores[0]), Exit(1, *scores[1])), FinalScores(None, *scores[2]))


def test_benefit_and_what_is_kept_in_points():
    found = measure([pair(0.6635, 0.7206, 0.7705)])
    assert found.points and found.pays
    assert found.benefit.median == pytest.approx(10.70)
    assert found.kept.median == pytest.approx(5.71 / 10.70)
    assert found.text == "benefit of depth +10.70 points; benefit kept 0.53"


def test_benefit_and_what_is_kept_of_a_loss():
    found = measure([pair(1.6514, 1.5473, 1.3879, losses=True)])
    assert not found.points
    assert found.benefit.median == pytest.approx(100 * (1.6514 / 1.3879 - 1))
    assert found.kept.median == pytest.approx((1.6514 - 1.5473) / (1.6514 - 1.3879))


def test_over_seeds():
    found = measure([pair(0.5, 0.6, 0.7), pair(0.5, 0.55, 0.71)])
    assert (found.benefit.low, found.benefit.high) == pytest.approx((20, 21))
    assert (found.kept.low, found.kept.high) == pytest.approx((5 / 21, 0.5))


@pytest.mark.parametrize(
    "pairs",
    [
        [pair(0.7, 0.9, 0.7)],
        [pair(0.8, 0.9, 0.7)],
        [pair(0.70, 0.7, 0.71), pair(0.70, 0.7, 0.73)],  # 1 and 3 points: the spread is as large as the benefit
    ],
)
def test_depth_that_buys_no_more_than_chance(pairs):
    found = measure(pairs)
    assert not found.pays and found.kept is None
    assert SAYS_NOTHING in found.text


@pytest.mark.parametrize("loss", [None, float("inf"), float("nan")])
def test_a_run_that_diverged_measures_nothing(loss):
    assert measure([pair(loss, 1.0, 1.0, losses=True)]) is None


def test_one_exit_or_no_run_measures_nothing():
    assert measure([]) is None
    assert measure([Pair((Exit(0, 1.0, 0.5),), FinalScores(None, 1.0, 0.5))]) is None


def test_the_better_run_has_the_higher_accuracy_then_the_lower_loss():
    worst, middle, best = FinalScores(None, 0.1, 0.5), FinalScores(None, 2.0, 0.6), FinalScores(None, 1.0, 0.6)
    assert goodness([worst]) < goodness([middle]) < goodness([best])
    assert goodness([FinalScores(None, None, None)]) < goodness([FinalScores(None, 9.0, None)])
