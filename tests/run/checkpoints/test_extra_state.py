"""Layers with `get_extra_state`: it is saved, resumed, gathered from ranks and exported; nothing is pickled."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.extra_state import extra_state, load_extra_state
from decoupled_pp.run.checkpoints.opened import latest_checkpoint
from decoupled_pp.run.checkpoints.resume import load_model
from decoupled_pp.run.checkpoints.weights import export_safetensors
from decoupled_pp.run.folder import load_weights
from kit import ignore, refused, vector_batches
from ranks import launch, values

BATCHES = vector_batches(4, 4, 6, 3)


class Counting(nn.Linear):
    """Counts its training packets, and keeps what it is told to."""

    def __init__(self, *sizes, keep=None):
        super().__init__(*sizes)
        self.history = {"calls": 0, "seen": [torch.zeros(2)], "more": keep}

    def forward(self, x):
        if self.training:
            self.history["calls"] += 1
            self.history["seen"].append(torch.ones(self.history["calls"]))
        return super().forward(x)

    def get_extra_state(self):
        return dict(self.history)

    def set_extra_state(self, state):
        self.history = dict(state)


class Scaled(nn.Linear):
    """Keeps a tensor, as layers of fp8 libraries do; its size changes."""

    scale = torch.ones(1)

    def forward(self, x):
        if self.training:
            self.scale = torch.cat([self.scale, torch.ones(1)])
        return super().forward(x)

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state


def trainer(folder=None, keep=None):
    torch.manual_seed(0)
    layers = [nn.Sequential(Counting(6, 6, keep=keep)), Scaled(6, 6), Counting(6, 3)]
    plan = partition(layers, 2, [1, 2], BATCHES[0][0])
    return Trainer(plan, critic=lambda _: Counting(6, 3), checkpoints=folder, device="cpu", observer=ignore)


def kept(network):
    return [network[0][0].history["calls"], len(network[0][0].history["seen"]), len(network[1].scale)]


@pytest.fixture
def run(tmp_path):
    ours = trainer(tmp_path / "checkpoints")
    ours.fit(BATCHES, 3)
    return ours


def test_a_resumed_run_has_it_again(run, tmp_path):
    resumed = trainer(tmp_path / "checkpoints")
    resumed.fit(BATCHES, 5, resume=True)
    assert kept(resumed.plan.module) == [5, 6, 6]
    assert resumed.stages[0].critic.history["calls"] == 5


def test_a_whole_network_is_given_it(run, tmp_path):
    network = trainer().plan.module
    load_model(latest_checkpoint(tmp_path / "checkpoints"), network)
    assert kept(network) == kept(run.plan.module) == [3, 4, 4]


def test_an_exported_file_holds_it(run, tmp_path):
    export_safetensors(run.export(), tmp_path / "model.safetensors")
    network = trainer().plan.module
    load_weights(tmp_path / "model.safetensors", network)
    assert kept(network) == [3, 4, 4]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["1._extra_state"], torch.ones(4))


def on_a_rank(folder):
    ours = trainer(folder)
    ours.fit(BATCHES, 3)
    resumed = trainer(folder)
    resumed.fit(BATCHES, 4, resume=True)
    return [kept(ours.export()), kept(resumed.export()), resumed.export()[2].history["calls"]]


def test_every_rank_exports_that_of_all(tmp_path):
    expected = [[3, 4, 4], [4, 5, 5], 4]
    assert values(launch(on_a_rank, tmp_path / "checkpoints", size=2, folder=tmp_path)) == [expected] * 2


def test_what_cannot_be_loaded_safely_is_refused_before_training(tmp_path):
    for keep in (object(), lambda: 0, refused):
        with refused("extra-state-not-savable", ValueError, "'0.0'"):
            trainer(tmp_path, keep=keep).fit(BATCHES, 1)
    assert not list(tmp_path.glob("step-*"))
    trainer(keep=object()).fit(BATCHES, 1)  # nobody saves it


def test_the_network_itself_may_have_some():
    layer = Counting(2, 2)
    packed = extra_state(layer)
    layer.history["calls"] = 7
    load_extra_state(layer, packed)
    assert layer.history["calls"] == 0
