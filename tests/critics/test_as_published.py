"""Defaults of critics against the numbers of their sources: layers, parameters, constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.settings.critics import LlsCritic

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
