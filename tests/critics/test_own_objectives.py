"""Critics with an objective of their own, each against its formula written out a second time."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.contracts import UsageError
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.critics.lls import sinusoids
from decoupled_pp.critics.predsim import pooling_kernel, similarities
from decoupled_pp.losses import cross_entropy
from decoupled_pp.objective import View, local_loss, rider_of
from decoupled_pp.sections import (
    CollaborativeCritic,
    InfoproCritic,
    LlsCritic,
    NeuronGroupsCritic,
    PredsimCritic,
)

CLASSES = 5


@pytest.fixture
def images(context_of):
    """A small convolutional network, and the context of its stage 0 of 3 (a function of the stage)."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )
    return lambda stage=0, stages=3: context_of(network, torch.randn(6, 3, 8, 8), 1 + stage, stage, stages)


def view_of(context, rider=()):
    hidden = context.hidden.clone().requires_grad_()
    return View(context.sample, hidden, torch.randint(CLASSES, (6,)), rider)


def gradient(critic, view):
    (found,) = torch.autograd.grad(local_loss(critic, view, cross_entropy), view.hidden)
    return found


def test_lls(images):
    context = images()
    critic = build_critic(LlsCritic(kind="lls", pooled=2, temperature=0.5))(context)
    check_critic(critic, context)
    view = view_of(context)
    basis = torch.tensor([[math.sin((50 + c * 462 / 4) * t) for t in range(32)] for c in range(CLASSES)])
    for sample, logits in zip(context.hidden, critic(context.hidden), strict=True):
        pooled = torch.stack([block.mean((-2, -1)) for row in sample.split(4, 1) for block in row.split(4, 2)], 1)
        pooled = pooled.flatten()
        expected = [float((pooled / pooled.norm()) @ row) / 0.5 for row in basis]
        assert logits.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert local_loss(critic, view, cross_entropy) == F.cross_entropy(critic(view.hidden), view.target)
    assert not list(critic.parameters()) and gradient(critic, view).any()


def test_sinusoids_differ_between_classes():
    alike = F.normalize(sinusoids(10, 256), dim=1)
    assert (alike @ alike.T - torch.eye(10)).abs().max() < 0.5


def test_predsim(images):
    context = images()
    critic = build_critic(PredsimCritic(kind="predsim", similarity=0.7, features=32))(context)
    check_critic(critic, context)
    nn.init.normal_(critic.prediction.weight)
    view = view_of(context)
    ours, labels = critic.projection(view.hidden), F.one_hot(view.target, CLASSES).float()
    loss = 0.0
    for i in range(6):
        for j in range(6):
            one, other = (ours[k].flatten(1).std(1) for k in (i, j))
            ours_ij = F.cosine_similarity(one - one.mean(), other - other.mean(), dim=0)
            label_ij = F.cosine_similarity(labels[i] - 1 / CLASSES, labels[j] - 1 / CLASSES, dim=0)
            loss = loss + (ours_ij - label_ij) ** 2 / 36
    pooled = F.avg_pool2d(view.hidden, 4).flatten(1)  # 8 channels of 2 x 2
    prediction = F.cross_entropy(pooled @ critic.prediction.weight.T + critic.prediction.bias, view.target)
    found = local_loss(critic, view, cross_entropy)
    assert found.item() == pytest.approx((0.3 * prediction + 0.7 * loss).item(), rel=1e-4)


def test_predsim_begins_with_no_opinion(images):
    context = images()
    critic = build_critic(PredsimCritic(kind="predsim"))(context)
    assert not critic(context.hidden).std(dim=0).any()


@pytest.mark.parametrize(("shape", "most", "kernel"), [((2, 8, 8, 8), 512, 1), ((2, 8, 8, 8), 511, 2), ((2, 9, 5, 7), 18, 4)])
def test_predsim_pools_just_enough(shape, most, kernel):
    assert pooling_kernel(shape, most) == kernel


def test_similarities_of_vectors_are_centred_cosines():
    features = torch.randn(4, 7)
    assert torch.allclose(similarities(features), torch.corrcoef(features), atol=1e-5)


def test_infopro(images):
    settings = InfoproCritic(kind="infopro", reconstruction=(4.0, 1.0), prediction=(0.5, 1.0))
    image = images().sample
    low, high = image.amin((0, 2, 3), keepdim=True), image.amax((0, 2, 3), keepdim=True)
    whole = (image - low) / (high - low)
    for stage, (rebuild, predict) in enumerate([(4.0, 0.5), (1.0, 1.0)]):
        context = images(stage)
        critic = build_critic(settings)(context)
        check_critic(critic, context)
        view = view_of(context, rider=() if stage == 0 else image)
        view.inputs = image if stage == 0 else torch.randn(6, 8, 8, 8)
        rebuilt = torch.sigmoid(critic.decoder(view.hidden))  # no enlarging: the stage's output is as large
        cross = -(whole * rebuilt.log() + (1 - whole) * (1 - rebuilt).log()).mean()
        expected = rebuild * cross + predict * F.cross_entropy(critic(view.hidden), view.target)
        assert local_loss(critic, view, cross_entropy).item() == pytest.approx(expected.item(), rel=1e-4)
        assert rider_of(critic, view) is (image, ())[stage]


def test_infopro_with_two_stages_sends_no_image(images):
    critic = build_critic(InfoproCritic(kind="infopro"))(images(0, 2))
    assert rider_of(critic, view_of(images(0, 2))) == ()


def test_neuron_groups(images):
    context = images()
    critic = build_critic(NeuronGroupsCritic(kind="neuron_groups", groups=2, diversity=0.3, temperature=2.0))(context)
    check_critic(critic, context)
    view = view_of(context)
    logits = [one(view.hidden) for one in critic.critics]
    rows = []
    for b in range(6):
        wrong = [c for c in range(CLASSES) if c != view.target[b]]
        first, second = ((one[b, wrong] / 2.0).softmax(0) for one in logits)
        rows.append(F.cosine_similarity(first, second, dim=0))
    expected = sum(F.cross_entropy(one, view.target) for one in logits) + 0.3 * torch.stack(rows).mean()
    assert local_loss(critic, view, cross_entropy).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(critic(view.hidden), (logits[0] + logits[1]) / 2)


def test_a_groups_gradient_stays_in_its_channels(images):
    context = images()
    critic = build_critic(NeuronGroupsCritic(kind="neuron_groups", groups=4, diversity=0.0))(context)
    view = view_of(context)
    found = gradient(critic, view)
    for group in range(4):
        (alone,) = torch.autograd.grad(F.cross_entropy(critic.critics[group](view.hidden), view.target), view.hidden)
        own = slice(2 * group, 2 * group + 2)
        assert torch.allclose(found[:, own], alone[:, own], atol=1e-7)


def test_collaborative(images):
    context = images()
    settings = CollaborativeCritic(kind="collaborative", heads=3, label_share=0.6, temperature=2.0)
    critic = build_critic(settings)(context)
    check_critic(critic, context)
    view = view_of(context)
    logits = [head(view.hidden) for head in critic.heads]
    expected = 0.0
    for own, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        consensus = ((logits[others[0]] + logits[others[1]]) / 2 / 2.0).softmax(-1).detach()
        soft = -(consensus * (logits[own] / 2.0).log_softmax(-1)).sum(-1).mean()
        expected = expected + 0.6 * F.cross_entropy(logits[own], view.target) + 0.4 * 4.0 * soft
    assert local_loss(critic, view, cross_entropy).item() == pytest.approx(expected.item(), rel=1e-5)
    (whole,) = torch.autograd.grad(expected, view.hidden)
    assert torch.allclose(gradient(critic, view), whole / 3, atol=1e-7)
    weight = critic.heads[1].linear.weight
    (ours,) = torch.autograd.grad(local_loss(critic, view, cross_entropy), weight)
    assert ours.any()  # the heads themselves learn at full rate
    logits = [head(view.hidden.detach()) for head in critic.heads]
    consensus = ((logits[0] + logits[2]) / 4).softmax(-1).detach()
    soft = -(consensus * (logits[1] / 2.0).log_softmax(-1)).sum(-1).mean()
    (alone,) = torch.autograd.grad(0.6 * F.cross_entropy(logits[1], view.target) + 1.6 * soft, weight)
    assert torch.allclose(ours, alone, atol=1e-7)


SETTINGS = [
    PredsimCritic(kind="predsim"),
    InfoproCritic(kind="infopro"),
    LlsCritic(kind="lls"),
    NeuronGroupsCritic(kind="neuron_groups", base="mlp_sr"),
    CollaborativeCritic(kind="collaborative", base="mlp_sr"),
]


@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=lambda one: one.kind)
def test_tokens_are_refused_by_name(settings, context_of):
    network = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7))
    with pytest.raises(UsageError, match=f"critic {settings.kind} is for images"):
        build_critic(settings)(context_of(network, torch.randint(7, (2, 5)), 1))


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=lambda one: one.kind)
def test_targets_that_are_no_classes_are_refused(settings, images):
    context = images()
    view = view_of(context)
    view.target = torch.randn(6, CLASSES)
    with pytest.raises(UsageError, match=f"critic {settings.kind} needs one class index per sample"):
        local_loss(build_critic(settings)(context), view, F.mse_loss)


def test_groups_must_divide(images):
    with pytest.raises(UsageError, match="8 channels do not divide into 3 groups; change critic.groups"):
        build_critic(NeuronGroupsCritic(kind="neuron_groups", groups=3))(images())
