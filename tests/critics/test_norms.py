"""Layers whose weights are computed (norms as hooks, parametrizations) get fresh ones of their own in critics."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize

from decoupled_pp import Trainer, partition
from decoupled_pp.critics.fresh import fresh_copy
from kit import ignore, refused

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Doubled(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, weight):
        return weight * 2


class LowRank(nn.Module):
    """A parametrization with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Linear(3, 3, bias=False)

    def forward(self, weight):
        return weight * self.factor.weight.sum()


def doubled(layer):
    return parametrize.register_parametrization(layer, "weight", Doubled())


def low_rank(layer):
    return parametrize.register_parametrization(layer, "weight", LowRank())


def both(layer):
    return doubled(parametrizations.weight_norm(layer))


NORMS = [
    utils.weight_norm,
    utils.spectral_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    doubled,
    low_rank,
    both,
]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{norm.__module__.rpartition('.')[2]}.{norm.__name__}")
def test_a_fresh_copy_has_weights_of_its_own_under_the_same_names(norm):
    torch.manual_seed(0)
    layer = nn.Sequential(norm(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU())
    layer(X)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    copied = fresh_copy(layer, "1")
    assert list(copied.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    copied(X).square().mean().backward()
    assert all(value.grad is not None for value in copied.parameters())
    layer(X)  # the layer itself is as it was
    assert not torch.allclose(copied[0].weight, layer[0].weight, rtol=0.1)


@pytest.mark.parametrize("norm", [utils.weight_norm, parametrizations.weight_norm])
def test_a_fresh_weight_is_that_of_the_plain_layer(norm):
    """The norm only writes the initial weight in another way."""
    layer = norm(nn.Linear(4, 5))
    torch.manual_seed(3)
    copied = fresh_copy(layer, "0")
    torch.manual_seed(3)
    plain = nn.Linear(4, 5)
    inputs = torch.randn(2, 4)
    torch.testing.assert_close(copied(inputs), plain(inputs))


def test_the_power_iteration_knows_the_fresh_weight():
    """Also in evaluation, where it does not go on."""
    copied = fresh_copy(parametrizations.spectral_norm(nn.Linear(6, 6)), "0").eval()
    copied(torch.randn(2, 6))
    assert torch.linalg.matrix_norm(copied.weight.detach(), 2).item() == pytest.approx(1.0, rel=0.05)


def test_normed_layers_train_under_a_critic_of_copies():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    layers += [nn.Sequential(norm(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU()) for norm in NORMS[:4]]
    layers += [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))]
    plan = partition(layers, 2, [2, 4], X)
    trainer = Trainer(plan, critic={"kind": "auglocal", "depth": 3}, device="cpu", observer=ignore)
    trainer.fit([(X, torch.arange(8) % 3)], 2)


class Opaque(nn.Module):
    """Has a parameter that nothing initialises."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight):
        return weight * self.scale


def test_a_parametrization_that_cannot_be_made_afresh_is_named():
    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Opaque())
    with refused("layer-not-copyable"):
        fresh_copy(layer, "2")
