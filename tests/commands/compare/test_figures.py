"""Figures against numbers reckoned by hand."""

import math
from dataclasses import replace

import pytest
from compared import contender, flushes, run

from decoupled_pp.commands.compare.figures import (
    busy_shares,
    critic_ratio,
    expected_speed_up,
    run_figures,
    seconds_to,
    summarize,
    targets,
    textbook_bubble,
    traffic,
)
from decoupled_pp.commands.spread import Spread
from decoupled_pp.core.reports import Exit
from recorded import stage_summary


def test_busy_shares_are_taken_between_updates():
    assert busy_shares(run()) == pytest.approx({0: 0.4, 1: 0.6})


def test_share_of_ideal_and_bubble():
    figures = run_figures(run())
    assert figures.share_of_ideal == pytest.approx(0.6)
    assert figures.bubble == pytest.approx(0.5)


def test_a_run_too_short_for_two_updates_has_no_bubble_to_tell():
    spans = {rank: row[:3] for rank, row in flushes().items()}
    figures = run_figures(run(spans=spans))
    assert figures.share_of_ideal is None and figures.bubble is None


def test_throughput_is_samples_per_update_over_the_mean_period():
    figures = run_figures(run(mean=0.02))
    assert figures.samples_per_update == 4
    assert figures.samples_per_second == pytest.approx(200)


def test_the_worst_rank_counts_for_memory():
    rows = [
        stage_summary(saved_activation_bytes_peak=10, memory_bytes_peak=7),
        stage_summary(saved_activation_bytes_peak=30),
    ]
    figures = run_figures(run(stages=rows))
    assert figures.activation_bytes == 30 and figures.memory_bytes == 5000


def test_critic_ratio_is_of_the_stage_with_the_costliest_critic():
    assert critic_ratio([stage_summary(critic_parameters=5), stage_summary()]) == pytest.approx(0.5 / 3)
    assert critic_ratio([stage_summary(), stage_summary()]) is None


def test_the_target_is_the_best_pipeline_of_the_same_repeat():
    runs = [run("decoupled", losses=(0.1,)), run("1f1b", losses=(2.0,)), run("zbv", losses=(1.5,))]
    runs += [run("backprop", losses=(1.0,)), run("1f1b", repeat=1, losses=(1.7,))]
    assert targets(runs) == {0: 1.5, 1: 1.7}
    assert targets([run("decoupled"), run("backprop", losses=(1.0,))]) == {0: 1.0}
    assert targets([run("decoupled")]) == {}


def test_a_loss_that_is_not_finite_is_the_worst_and_no_target():
    runs = [run("1f1b", losses=(None,)), run("zbv", losses=(1.5,)), run("1f1b", repeat=1, losses=(None,))]
    assert targets(runs) == {0: 1.5}
    row = summarize(contender("1f1b"), [*runs, run("1f1b", repeat=2)], 2, 2)
    assert row.val_loss == Spread(math.inf, 1.0, math.inf)
    assert row.reached_target == "1 of 2"


def test_time_to_target_is_of_the_first_evaluation_that_reached_it():
    assert seconds_to(run(losses=(3.0, 2.0, 2.5)), 2.0) == 2.0
    assert seconds_to(run(losses=(3.0, 2.0, 2.5)), 1.9) is None
    assert seconds_to(run(losses=(3.0, 2.0 + 1e-6)), 2.0) == 2.0  # the same, summed in another order


def test_a_summary_pairs_repeats():
    runs = [run("1f1b", mean=0.02), run("1f1b", repeat=1, mean=0.04)]
    runs += [run("decoupled", mean=0.01, losses=(5.0,)), run("decoupled", repeat=1, mean=0.01, losses=(0.5,))]
    row = summarize(contender("decoupled"), runs, 2, 2)
    assert row.ratio_to_1f1b == Spread(3.0, 2.0, 4.0)
    assert row.reached_target == "1 of 2" and row.seconds_to_target == Spread(1.0, 1.0, 1.0)
    assert row.ratio_to_backprop is None


def test_depth_is_measured_beside_the_best_baseline():
    """Plain ends at 1, the first exit at 3, the last at 2: half of the benefit of depth is kept."""
    mine = run("decoupled", losses=(2.0,))
    mine = replace(mine, report=replace(mine.report, exits=(Exit(0, 3.0, None), Exit(1, 2.0, None))))
    runs = [run("1f1b", losses=(1.5,)), run("backprop", losses=(1.0,)), mine]
    found = summarize(contender("decoupled"), runs, 2, 2).depth
    assert found.kept.median == 0.5 and found.benefit.median == pytest.approx(200)
    assert summarize(contender("1f1b"), runs, 2, 2).depth is None


def test_traffic_is_per_training_sample():
    assert [dict(one) for one in traffic(run())] == [{"from": 0, "to": 1, "forward": 10.0, "backward": 2.0}]


@pytest.mark.parametrize(
    ("strategy", "expected"), [("1f1b", 3 / 7), ("interleaved_1f1b", 3 / 11), ("decoupled", 0), ("data_parallel", None)]
)
def test_textbook_bubbles(strategy, expected):
    assert textbook_bubble(strategy, 4, 4) == expected


def test_expected_speed_up():
    assert expected_speed_up(0.0, 2, 2) == 1.5
    assert expected_speed_up(0.25, 2, 4) == 1.0
