"""A measured profile: its memory is that of the real stages, its passes add up, and the network is left alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.commands.plan.costs import read_profile
from decoupled_pp.commands.plan.measure import measure_profile
from decoupled_pp.commands.plan.predict import Setting, predict
from decoupled_pp.models.cutting import minmax_cut
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.run import OptimizerSettings
from decoupled_pp.training.choices import choose_critic

SAMPLE, TARGET = torch.randn(8, 32), torch.arange(8) % 5


def _network():
    hidden = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(5)]
    return nn.Sequential(*hidden, nn.Linear(32, 5))


def _profile(network, kind="AdamW"):
    return measure_profile(
        network,
        SAMPLE,
        choose_critic("head"),
        stages=2,
        loss=cross_entropy,
        optimizer=OptimizerSettings(kind=kind),
        device=torch.device("cpu"),
        source="test",
    )


def test_memory_is_that_of_the_real_stages():
    network = _network()
    profile = _profile(network)
    predicted = predict("decoupled", profile, Setting(2, 4), minmax_cut)
    plan = replace(partition(network, 2, "uniform", SAMPLE), boundaries=predicted.boundaries)
    trainer = Trainer(plan, device="cpu")
    trainer.fit([(SAMPLE, TARGET)], 2)
    for stage, memory in zip(trainer.stages, predicted.memory, strict=True):
        assert memory.activations == pytest.approx(stage.saved_activation_bytes_peak, rel=0.02)
        parameters = [p for m in (stage.trunk, stage.critic) if m is not None for p in m.parameters()]
        kept = [
            value
            for optimizer in stage.update.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        states = 2 * sum(p.numel() * 4 for p in parameters) + sum(v.numel() * v.element_size() for v in kept)
        assert memory.states == states


@pytest.mark.parametrize(("kind", "copies"), [("SGD", 0), ("AdamW", 2)])
def test_optimizer_state_is_measured(kind, copies):
    for layer in _profile(_network(), kind).layers:
        steps = layer.state_bytes - copies * layer.parameter_bytes  # AdamW keeps a step count of 4 bytes per parameter
        assert 0 <= steps <= 4 * 4


def test_the_network_is_as_it_was_and_the_profile_comes_back():
    network = _network()
    before, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    profile = _profile(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert read_profile(profile.write()) == profile
    assert (profile.samples, profile.target_bytes, len(profile.critics)) == (8, 8 * 8, 5)
    assert all(layer.forward > 0 for layer in profile.layers)
    assert sum(layer.backward for layer in profile.layers) > 0
