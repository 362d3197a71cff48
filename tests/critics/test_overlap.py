"""Overlap: the critic stands behind copies of the next stage's first layers, which the stage trains too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.objective import View
from decoupled_pp.critics import build_critic
from decoupled_pp.models import build_model
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.critics import HeadCritic, PredsimCritic, ReconstructCritic, SgrCritic
from decoupled_pp.settings.sections import GptModel, ResnetModel
from kit import refused

TOKENS = DataInfo("tokens", (6,), 11)


@pytest.fixture
def gpt():
    return build_model(GptModel(kind="gpt", width=8, depth=4, heads=2), TOKENS)


@pytest.mark.parametrize(("layers", "copied"), [(1, 1), (2, 2), (9, 3)])
def test_the_critic_judges_what_the_next_layers_make_of_the_output(context_of, gpt, layers, copied):
    """By hand; at most the layers below the network's head are copied, and they begin with its weights."""
    context = context_of(gpt, torch.randint(11, (2, 6)), 2)
    critic = build_critic(HeadCritic(), layers)(context)
    hidden = context.hidden
    for layer in list(gpt)[2 : 2 + copied]:
        hidden = layer(hidden)
    head = critic.critic
    assert torch.equal(critic(context.hidden), F.linear(head.norm(hidden), head.projection.weight))
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in gpt.parameters()}


def test_an_objective_of_its_own_is_taken_behind_the_copies(context_of):
    network = build_model(ResnetModel(kind="resnet", depth=8, width=4), DataInfo("image", (3, 8, 8), 5))
    context = context_of(network, torch.randn(4, 3, 8, 8), 1)
    critic = build_critic(PredsimCritic(kind="predsim"), 1)(context).eval()
    view = View(torch.randn(4, 3, 8, 8), context.hidden, torch.tensor([0, 1, 1, 4]))
    behind = View(view.inputs, network[1].eval()(context.hidden), view.target)
    assert torch.equal(critic.objective(view, cross_entropy), critic.critic.objective(behind, cross_entropy))


@pytest.mark.parametrize("settings", [SgrCritic(kind="sgr"), ReconstructCritic(kind="reconstruct")])
def test_critics_that_look_at_the_stage_itself_are_refused(context_of, settings):
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    with refused("critic-overlap-unsupported"):
        build_critic(settings, 1)(context_of(network, torch.randn(2, 4), 1))
