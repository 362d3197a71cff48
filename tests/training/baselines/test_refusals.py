"""A baseline that cannot have what it needs is refused in one line, mostly before the ranks have met."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from decoupled_pp import UsageError, partition
from decoupled_pp.links import join_world
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.baselines import BASELINES, Training, build_baseline, stages_needed
from kit import check_text, refused
from ranks import PATIENCE, launch

TRAINING = Training(cross_entropy, OptimizerSettings(kind="SGD"), ScheduleSettings(), 1)


def build(kind, stages, rank, ranks):
    layers = [nn.Linear(3, 3) for _ in range(6)]
    plan = partition(layers, stages, "uniform", torch.ones(2, 3), critic=None)
    return build_baseline(kind, plan, TRAINING, torch.device("cpu"), rank=rank, ranks=ranks)


def batches(*sizes):
    return [(torch.ones(size, 3), torch.zeros(size, dtype=torch.long)) for size in sizes]


def test_unknown():
    with refused("not-one-of-the-choices", UsageError, "'gpip'", "backprop, gpipe, 1f1b"):
        build("gpip", 2, 0, 1)


def test_backprop_has_one_rank():
    with refused("ranks-do-not-fit-strategy", UsageError, "backprop", "not 2"):
        build("backprop", 2, 0, 2)


@pytest.mark.parametrize("kind", [kind for kind in BASELINES if stages_needed(kind, 2) is not None])
def test_a_plan_of_other_stages(kind):
    wanted = stages_needed(kind, 2)
    with refused("stages-do-not-fit-strategy", UsageError, kind, f"{wanted} stages, not 3"):
        build(kind, 3, 0, 2)


CASES = {
    "1f1b": ((4,), "micro-batches-do-not-fit-strategy", "with 1 micro-batches"),
    "interleaved_1f1b": ((4,) * 5, "micro-batches-do-not-fit-strategy", "with 5 micro-batches"),
    "gpipe": ((4, 3), "micro-batches-of-other-shapes", "must have one shape"),
    "data_parallel": ((4, 4, 4), "micro-batches-do-not-fit-strategy", "a multiple of 2"),
}


@pytest.mark.parametrize("kind", CASES)
def test_micro_batches(kind, tmp_path):
    sizes, code, part = CASES[kind]
    for result in launch(_step, kind, sizes, size=2, folder=tmp_path):
        assert result.value[0] == code
        check_text(*result.value, f"`strategy` {kind}", part)


def _step(kind, sizes):
    world = join_world(PATIENCE)
    strategy = build(kind, stages_needed(kind, 2) or 2, world.rank, world.size)
    with pytest.raises(UsageError) as caught:
        strategy.step(batches(*sizes))
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("kind", ["zero_bubble", "zbv"])
def test_a_split_backward_is_not_compiled(kind):
    layers = [nn.Linear(3, 3) for _ in range(4)]
    plan = partition(layers, 4, "uniform", torch.ones(2, 3), critic=None)
    with refused("contradictory-settings", UsageError, kind, "`training.compile`"):
        build_baseline(
            kind, plan, replace(TRAINING, options=StageSettings(compile=True)), torch.device("cpu"), rank=0, ranks=2
        )
