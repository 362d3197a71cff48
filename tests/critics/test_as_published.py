"""Defaults of critics against the numbers of their sources: layers, parameters, constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.core.objective import View, local_loss
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.critics import LlsCritic, ReconstructCritic

CLASSES = 10


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def judged(context_of):
    """A function of a stage output's shape: the context of a stage with it, before ten classes."""

    def build(*shape, stage=0, stages=2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Identity(), nn.Identity(), nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)))
        return context_of(network, torch.randn(2, *shape), 1, stage, stages)

    return build


@pytest.mark.parametrize(("shape", "features"), [((64,), 4), ((6, 9, 9), 96)])
def test_lls(judged, shape, features):
    """Source: Apolinario & Roy 2025, the authors' code: pooled to 4 (images 4 x 4), temperature 0.5, no parameters."""
    context = judged(*shape)
    critic = build_critic(LlsCritic(kind="lls"))(context)
    check_critic(critic, context)
    assert (critic.pooled, critic.temperature, parameters(critic)) == (4, 0.5, 0)
    assert critic.basis.shape == (CLASSES, features)
    pool = F.adaptive_avg_pool1d if len(shape) == 1 else F.adaptive_avg_pool2d
    unit = F.normalize(pool(context.hidden, 4).flatten(1), dim=1)
    torch.testing.assert_close(critic(context.hidden), unit @ critic.basis.T / 0.5)


def test_lls_of_whole_vectors(judged):
    context = judged(64)
    critic = build_critic(LlsCritic(kind="lls", vectors="whole", temperature=1.0))(context)
    torch.testing.assert_close(critic(context.hidden), F.normalize(context.hidden, dim=1) @ critic.basis.T)


@pytest.mark.parametrize(("stages", "share"), [(2, 10), (5, 2.5)])
def test_reconstruct(judged, stages, share):
    """Source: LoPT (2605.04913), the authors' code, `lopt/modeling_lopt.py`; 10 times the mean of K - 1 losses."""
    context = judged(64, stages=stages)
    critic = build_critic(ReconstructCritic(kind="reconstruct"))(context)
    norm, first, gelu, last = critic.decoder
    assert [type(layer) for layer in critic.decoder] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert (first.out_features, last.in_features, gelu.approximate) == (16, 16, "none")
    assert parameters(critic) == 2256
    for layer in (first, last):
        bound = 0.1 * (6 / (64 + 16)) ** 0.5  # Xavier uniform, gain 0.1
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    given, hidden = torch.randn(3, 64), torch.randn(3, 64)
    rebuilt = F.linear(F.gelu(F.linear(norm(hidden), first.weight)), last.weight)
    expected = share * (rebuilt - given).square().mean()
    torch.testing.assert_close(local_loss(critic, View(given, hidden, ()), cross_entropy), expected)


def test_reconstruct_of_earlier_versions(judged):
    critic = build_critic(ReconstructCritic(kind="reconstruct", decoder="linear"))(judged(64, stages=5))
    assert (type(critic.decoder), parameters(critic), critic.weight) == (nn.Linear, 4160, 10)
