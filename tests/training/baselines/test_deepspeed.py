"""DeepSpeed's engine as a baseline: payloads of any kind, phases, traffic, silence, and what it refuses."""

import os
import sys

import pytest
import torch
from torch import nn

from decoupled_pp import UsageError, partition
from decoupled_pp.links import join_world
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings
from decoupled_pp.training.baselines import Training, build_baseline
from kit import refused, vector_batches
from ranks import PATIENCE, launch

WIDTH, M, FLOAT = 6, 4, 4
CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Between layers: a float that not every layer uses, a mask, indices, and hidden values, not contiguous."""

    def __init__(self, uses_first):
        super().__init__()
        self.linear, self.uses_first = nn.Linear(WIDTH, WIDTH), uses_first

    def forward(self, payload):
        first, mask, order, hidden = payload
        hidden = torch.tanh(self.linear(hidden))[:, order] * mask
        if self.uses_first:
            hidden = hidden + first
        return first.detach() * 0.5, mask, order, hidden.t().contiguous().t()


class Open(nn.Module):
    def forward(self, inputs):
        return inputs, inputs[:, :1] > -1.0, torch.arange(WIDTH).flip(0), inputs


class Close(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, payload):
        return self.linear(payload[-1])


def layers():
    torch.manual_seed(0)
    return [nn.Sequential(Open(), Mixed(True)), Mixed(False), nn.Sequential(Mixed(True), Close())]


def training(kind="SGD", precision="fp32", **arguments):
    optimizer = OptimizerSettings(kind=kind, lr=0.1, arguments=arguments)
    return Training(cross_entropy, optimizer, ScheduleSettings(), 1, StageSettings(precision=precision))


def batches(*sizes):
    return [vector_batches(1, size, WIDTH, 3)[0] for size in sizes]


STEPS = [(3,) * M, (3, 5, 2, 4), (2, 2), (3,) * M]
"""Sizes of the micro-batches of some steps: of one shape, of several, fewer of another shape, and the first again."""


def losses_of(kind, precision, rank, ranks):
    plan = partition(layers(), 3, "uniform", batches(2)[0][0], critic=None)
    strategy = build_baseline(kind, plan, training(precision=precision), CPU, rank=rank, ranks=ranks)
    return [loss for sizes in STEPS for loss in strategy.step(batches(*sizes))]


def on_ranks(precision):
    world = join_world(PATIENCE)
    environment = dict(os.environ)
    losses = losses_of("deepspeed", precision, world.rank, world.size)
    assert dict(os.environ) == environment
    return losses


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_payloads_of_any_kind_and_shape(precision, rtol, tmp_path):
    """Losses of later steps depend on the updates of earlier ones, on every stage."""
    results = launch(on_ranks, precision, size=3, folder=tmp_path)
    expected = torch.stack(losses_of("backprop", precision, 0, 1))
    torch.testing.assert_close(torch.stack(results[-1].value), expected, rtol=rtol, atol=1e-6)
    assert [result.output for result in results] == ["", "", ""]
    assert not results[0].value and not results[1].value


class Told:
    def __init__(self):
        self.laps, self.packet = [], None

    def begin(self, packet):
        self.packet = packet

    def lap(self, phase):
        self.laps.append((phase, self.packet))


def recorded():
    world = join_world(PATIENCE)
    plan = partition([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)], 2, "uniform", torch.ones(3, WIDTH), critic=None)
    strategy = build_baseline("deepspeed", plan, training(), CPU, rank=world.rank, ranks=world.size)
    strategy.step(batches(3, 3))
    strategy.recorder = Told()
    strategy.step(batches(3, 3))
    links = {ends: vars(counters) for ends, counters in strategy.links.items()}
    return strategy.recorder.laps, str(links), strategy.saved_activation_bytes_peak


def test_phases_and_traffic(tmp_path):
    results = [result.value for result in launch(recorded, size=2, folder=tmp_path)]
    first, last = (result[0] for result in results)
    busy = [(phase, packet) for phase, packet in first if phase != "wait_in"]
    assert busy == [("forward", 2), ("forward", 3), ("backward", 2), ("backward", 3), ("step", 3)]
    of_one = ["wait_in", "forward", "critic", "wait_in", "backward"]
    assert last == [(phase, n) for n in (2, 3) for phase in of_one] + [("wait_in", 3), ("step", 3)]
    size = 4 * 3 * WIDTH * FLOAT  # 2 steps of 2 micro-batches
    assert f"'packets': 4, 'payload_bytes_forward': {size}, 'payload_bytes_backward': 0" in results[0][1]
    assert f"'packets': 0, 'payload_bytes_forward': 0, 'payload_bytes_backward': {size}" in results[1][1]
    assert results[0][2] == 2 * 3 * WIDTH * FLOAT  # the inputs of two micro-batches


def _build(chosen=None, layers=None, ranks=2):
    layers = layers or [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)]
    dtype = next((p.dtype for layer in layers for p in layer.parameters()), None)
    plan = partition(layers, 2, "uniform", torch.ones(2, WIDTH, dtype=dtype), critic=None)
    return build_baseline("deepspeed", plan, chosen or training(), CPU, rank=0, ranks=ranks)


def test_one_rank_is_refused():
    with refused("ranks-do-not-fit-strategy", UsageError, "deepspeed", "not 1"):
        _build(ranks=1)


def test_several_optimizers_are_refused():
    deep = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), nn.Linear(WIDTH, 3)]
    with refused("engine-takes-one-optimizer", UsageError, "stage 0 has 2 optimizers"):
        _build(training("Muon"), deep)


def test_a_stage_without_parameters_is_refused():
    with refused("engine-takes-one-optimizer", UsageError, "stage 0 has nothing to train"):
        _build(layers=[nn.Tanh(), nn.Linear(WIDTH, 3)])


def test_double_precision_is_refused():
    with refused("dtype-cannot-be-reduced", UsageError, "torch.float64"):
        _build(layers=[nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, 3).double()])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with refused("package-missing", UsageError, "pip install 'decoupled_pp[deepspeed]'"):
        _build()
