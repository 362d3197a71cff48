"""What a baseline demands and does not get is refused in one line; the ranks need not have met for most of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from decoupled_pp import UsageError, partition
from decoupled_pp.links import join_world
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.baselines import BASELINES, Training, build_baseline, stages_needed
from ranks import PATIENCE, launch

TRAINING = Training(cross_entropy, OptimizerSettings(kind="SGD"), ScheduleSettings(), 1)


def build(kind, stages, rank, ranks):
    layers = [nn.Linear(3, 3) for _ in range(6)]
    plan = partition(layers, stages, "uniform", torch.ones(2, 3), critic=None)
    return build_baseline(kind, plan, TRAINING, torch.device("cpu"), rank=rank, ranks=ranks)


def batches(*sizes):
    return [(torch.ones(size, 3), torch.zeros(size, dtype=torch.long)) for size in sizes]


def test_unknown():
    with pytest.raises(UsageError, match="strategy 'gpip' is not known; one of backprop, gpipe, 1f1b"):
        build("gpip", 2, 0, 1)


def test_backprop_has_one_rank():
    with pytest.raises(UsageError, match="backprop is the whole network in one process; start 1 rank, not 2"):
        build("backprop", 2, 0, 2)


@pytest.mark.parametrize("kind", [kind for kind in BASELINES if stages_needed(kind, 2) is not None])
def test_a_plan_of_other_stages(kind):
    wanted = stages_needed(kind, 2)
    with pytest.raises(UsageError, match=f"^{kind} on 2 ranks needs a plan of {wanted} stages, not 3$"):
        build(kind, 3, 0, 2)


CASES = {
    "1f1b": ((4,), "1f1b cannot run with 1 micro-batches per step: .+"),
    "interleaved_1f1b": ((4,) * 5, "interleaved_1f1b cannot run with 5 micro-batches per step: .+"),
    "gpipe": ((4, 3), "gpipe: micro-batches of one step must have one shape, not .+"),
    "data_parallel": ((4, 4, 4), "data_parallel: 3 micro-batches per step cannot be shared by 2 ranks evenly; .+"),
}


@pytest.mark.parametrize("kind", CASES)
def test_micro_batches(kind, tmp_path):
    sizes, expected = CASES[kind]
    for result in launch(_step, kind, sizes, expected, size=2, folder=tmp_path):
        assert result.value is True


def _step(kind, sizes, expected):
    world = join_world(PATIENCE)
    strategy = build(kind, stages_needed(kind, 2) or 2, world.rank, world.size)
    with pytest.raises(UsageError, match=f"^{expected}$"):
        strategy.step(batches(*sizes))
    return True


@pytest.mark.parametrize("kind", ["zero_bubble", "zbv"])
def test_a_split_backward_is_not_compiled(kind):
    layers = [nn.Linear(3, 3) for _ in range(4)]
    plan = partition(layers, 4, "uniform", torch.ones(2, 3), critic=None)
    with pytest.raises(UsageError, match=f"^{kind}: torch's split backward does not work with torch.compile; set"):
        build_baseline(
            kind, plan, replace(TRAINING, options=StageSettings(compile=True)), torch.device("cpu"), rank=0, ranks=2
        )
