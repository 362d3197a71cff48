"""Saved activations of the first step: by hand in one process, and a micro-batch for each one in flight."""

import pytest
import torch
from torch import nn

from decoupled_pp import partition
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.device import seeded
from decoupled_pp.links import join_world
from decoupled_pp.models import build_model
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings
from decoupled_pp.settings.sections import GptModel
from decoupled_pp.training.baselines import Training, build_baseline, stages_needed
from ranks import PATIENCE, launch

B, WIDTH, M, FLOAT = 5, 3, 4, 4
INPUT = B * WIDTH * FLOAT  # the bytes that a linear layer keeps: its input, the weight being a parameter
RESIDUAL = INPUT  # the squared error keeps the difference that it squares


def squared_error(output, target):
    return ((output - target) ** 2).mean()


def step(kind, rank, ranks):
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    plan = partition(layers, stages_needed(kind, ranks) or 2, "uniform", torch.ones(B, WIDTH), critic=None)
    training = Training(squared_error, OptimizerSettings(kind="SGD"), ScheduleSettings(), 1)
    strategy = build_baseline(kind, plan, training, torch.device("cpu"), rank=rank, ranks=ranks)
    assert strategy.saved_activation_bytes_peak is None
    strategy.step([(torch.randn(B, WIDTH), torch.randn(B, WIDTH)) for _ in range(M)])
    first = strategy.saved_activation_bytes_peak
    strategy.step([(torch.randn(B, WIDTH), torch.randn(B, WIDTH)) for _ in range(2 * M)])
    assert strategy.saved_activation_bytes_peak == first, "only the first step is measured"
    return first


def one_rank(kind):
    world = join_world(PATIENCE)
    return step(kind, world.rank, world.size)


def twice(kind):
    """The first step and a later one."""
    world = join_world(PATIENCE)
    with seeded(0):
        layers = build_model(GptModel(kind="gpt", width=8, depth=6, heads=2), DataInfo("tokens", (6,), 11))
    tokens = torch.randint(11, (B, 6))
    plan = partition(layers, stages_needed(kind, world.size), "uniform", tokens, critic=None)
    training = Training(cross_entropy, OptimizerSettings(kind="SGD"), ScheduleSettings(), 1)
    strategy = build_baseline(kind, plan, training, torch.device("cpu"), rank=world.rank, ranks=world.size)
    found = []
    for _ in range(2):
        strategy.saved_activation_bytes_peak = None
        strategy.step([(tokens, tokens)] * M)
        found.append(strategy.saved_activation_bytes_peak)
    return found


@pytest.mark.parametrize("kind", ["gpipe", "zero_bubble", "deepspeed"])
def test_the_first_step_is_like_any_other(kind, tmp_path):
    """Although torch runs a stage once for its shapes before it."""
    for result in launch(twice, kind, size=2, folder=tmp_path):
        first, later = result.value
        assert first == later > 0


def test_plain_backprop_holds_one_micro_batch():
    assert step("backprop", 0, 1) == 4 * INPUT + RESIDUAL


@pytest.mark.parametrize(("kind", "in_flight"), [("gpipe", (M, M)), ("1f1b", (2, 1)), ("deepspeed", (2, 1))])
def test_a_pipeline_holds_the_micro_batches_in_flight(kind, in_flight, tmp_path):
    first, last = (result.value for result in launch(one_rank, kind, size=2, folder=tmp_path))
    assert first == in_flight[0] * 2 * INPUT
    assert last == in_flight[1] * (2 * INPUT + RESIDUAL)
