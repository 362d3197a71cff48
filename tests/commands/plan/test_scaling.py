"""Scaling curves: what is extrapolated equals full simulation; counted transformers equal known sizes."""

import pytest

from decoupled_pp.commands.plan.costs import StageCosts
from decoupled_pp.commands.plan.orders import PIPELINES, stages_per_rank
from decoupled_pp.commands.plan.predict import STRATEGIES, Setting, predict_stages
from decoupled_pp.commands.plan.scaling import Scale, curve, pipeline_depth, point, step_seconds
from decoupled_pp.commands.plan.simulate import Link
from decoupled_pp.commands.plan.transformer import Transformer
from kit import refused

LINK = Link(latency=0.02, bandwidth=200.0)


def _costs(strategy, ranks):
    return [StageCosts(1.0, 1.1, 0.9, 0.3, 10, 5, 8, 8)] * (ranks * stages_per_rank(strategy))


@pytest.mark.parametrize("strategy", ["decoupled", *PIPELINES])
@pytest.mark.parametrize("size", [(2, 32), (4, 64), (8, 88), (4, 30), (6, 48)], ids=str)
def test_long_steps_equal_full_simulation(strategy, size):
    ranks, count = size
    setting = Setting(ranks, count, LINK)
    try:
        full = predict_stages(strategy, _costs(strategy, ranks), setting, 1)
    except ValueError:
        with refused("schedule-does-not-fit"):
            step_seconds(strategy, _costs(strategy, ranks), setting)
        return
    seconds, memory = step_seconds(strategy, _costs(strategy, ranks), setting)
    assert seconds == pytest.approx(full.step_seconds, rel=0.01)
    assert memory == max(one.total for one in full.memory)


@pytest.mark.parametrize("strategy", PIPELINES)
@pytest.mark.parametrize(("ranks", "rounds"), [(16, 1), (16, 2), (24, 3)])
def test_deep_pipelines_equal_full_simulation(strategy, ranks, rounds):
    setting = Setting(ranks, ranks * rounds, LINK)
    full = predict_stages(strategy, _costs(strategy, ranks), setting, 1)
    seconds, _ = step_seconds(strategy, _costs(strategy, ranks), setting, deep=4)
    assert seconds == pytest.approx(full.step_seconds, rel=0.01)


@pytest.mark.slow
def test_four_thousand_ranks_in_one_pipeline_are_planned():
    scale = Scale(Transformer(layers=8192), Link(5e-6), micro_batches=8192)
    points = [point(strategy, scale, 4096) for strategy in ("decoupled", "1f1b", "zbv")]
    assert [one.depth for one in points] == [4096] * 3
    assert points[1].efficiency == pytest.approx(8192 / (8192 + 4095), rel=0.05)  # the textbook's
    assert points[0].efficiency == pytest.approx(1 / 1.1, rel=0.01)  # the critics' share


def test_a_llama_of_seven_billion():
    """Llama 2 7B has 6.74 billion parameters; 6 per parameter and token are the usual count of operations."""
    model = Transformer(parameters=6.74e9)
    assert Transformer().total_parameters == pytest.approx(6.74e9, rel=0.01)
    operations = model.seconds * model.flops / model.tokens
    assert operations == pytest.approx(6 * 6.74e9, rel=0.2)
    stages = model.stages(8, critics=False)
    assert sum(one.memory for one in stages) == pytest.approx(16 * 6.74e9)
    assert sum(one.forward + one.backward for one in stages) == pytest.approx(model.seconds)


def test_devices_are_pipelines_side_by_side():
    scale = Scale(Transformer(), Link(5e-6, 25e9), micro_batches=256)
    assert [pipeline_depth("1f1b", scale, n) for n in (8, 64, 512, 4096, 6)] == [8, 32, 32, 32, 6]
    assert pipeline_depth("zbv", scale, 64) == 16
    one, two = curve("1f1b", scale, [32, 64])
    assert (one.replicas, two.replicas, one.micro_batches, two.micro_batches) == (1, 2, 256, 128)
    assert one.tokens_per_second < two.tokens_per_second < 2 * one.tokens_per_second  # strong scaling: more bubble
    weak = point("1f1b", Scale(Transformer(), Link(), micro_batches=256, weak=True), 64)
    assert weak.tokens_per_second == pytest.approx(
        2 * point("1f1b", Scale(Transformer(), Link(), micro_batches=256), 32).tokens_per_second
    )


def test_what_cannot_run_says_why():
    scale = Scale(Transformer(), Link(5e-6, 25e9))
    assert "one device, not 8" in curve("backprop", scale, [8])[0]
    assert "multiple of 2048" in curve("data_parallel", scale, [2048])[0]
    assert "at least as many micro-batches as ranks" in curve("1f1b", scale, [4096])[0]
    assert "must be at least 1" in curve("1f1b", scale, [0])[0]


@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_no_device_does_more_than_it_can(strategy):
    scale = Scale(Transformer(), Link(5e-6, 25e9), micro_batches=256)
    points = [one for one in curve(strategy, scale, [8, 64, 512]) if not isinstance(one, str)]
    assert points
    assert all(0 < one.efficiency <= 1 + 1e-9 for one in points)


@pytest.mark.parametrize("bad", [{"layers": 0}, {"flops": 0.0}, {"critic_share": -0.1}, {"parameters": 1e6}])
def test_no_transformer_has_that_size(bad):
    with refused("option-out-of-range"):
        Transformer(**bad)
