"""What a rank tells its recorder: every pass of every micro-batch once, and nothing of a library's trial runs."""

from collections import Counter

import pytest
import torch
from torch import nn

from decoupled_pp import partition
from decoupled_pp.commands.plan.orders import SPLIT
from decoupled_pp.links import join_world
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from decoupled_pp.training.baselines import BASELINES, Training, build_baseline, stages_needed
from ranks import PATIENCE, launch

B, WIDTH, M = 2, 4, 4


class Counting:
    """A recorder that counts phases."""

    def __init__(self):
        self.phases = Counter()

    def begin(self, packet):
        pass

    def lap(self, phase):
        self.phases[phase] += 1


def first_step(kind):
    world = join_world(PATIENCE)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    plan = partition(layers, stages_needed(kind, world.size), "uniform", torch.ones(B, WIDTH), critic=None)
    training = Training(cross_entropy, OptimizerSettings(kind="SGD"), ScheduleSettings(), 1)
    strategy = build_baseline(kind, plan, training, torch.device("cpu"), rank=world.rank, ranks=world.size)
    strategy.recorder = recorder = Counting()
    strategy.step([(torch.randn(B, WIDTH), torch.randint(WIDTH, (B,))) for _ in range(M)])
    return recorder.phases, len(strategy.parts), plan.stages - 1 in strategy.parts


@pytest.mark.parametrize("kind", [kind for kind in BASELINES if kind not in {"backprop", "data_parallel"}])
def test_every_pass_is_recorded_once(kind, tmp_path):
    for part in launch(first_step, kind, size=2, folder=tmp_path):
        phases, stages, last = part.value
        assert phases["forward"] == stages * M
        assert phases["backward"] == stages * M * (2 if kind in SPLIT else 1)
        assert phases["critic"] == (M if last else 0)
        assert phases["step"] == 1
