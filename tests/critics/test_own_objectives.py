"""Critics with an objective of their own, each against its formula written out a second time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import View, local_loss
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.critics.lls import sinusoids
from decoupled_pp.critics.predsim import similarities, square_kernel
from decoupled_pp.pipeline.losses import cross_entropy, find_loss
from decoupled_pp.settings.critics import (
    CollaborativeCritic,
    InfoproCritic,
    LlsCritic,
    NeuronGroupsCritic,
    PredsimCritic,
    ReconstructCritic,
    SgrCritic,
    VocabularyCritic,
)
from kit import refused

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


@pytest.mark.parametrize(
    ("shape", "most", "kernel"), [((2, 8, 8, 8), 512, 1), ((2, 8, 8, 8), 511, 2), ((2, 9, 5, 7), 18, 4)]
)
def test_predsim_pools_just_enough(shape, most, kernel):
    assert square_kernel(shape, most) == kernel


def test_similarities_of_vectors_are_centred_cosines():
    features = torch.randn(4, 7)
    assert torch.allclose(similarities(features), torch.corrcoef(features), atol=1e-5)


def test_infopro(images):
    settings = InfoproCritic(kind="infopro", reconstruction=[4.0, 1.0], prediction=[0.5, 1.0])
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
        assert critic.rider(view) is (image, ())[stage]


def test_infopro_with_two_stages_sends_no_image(images):
    critic = build_critic(InfoproCritic(kind="infopro"))(images(0, 2))
    assert critic.rider(view_of(images(0, 2))) == ()


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


def test_sgr_behind_a_layer_that_passes_no_gradient_on(images):
    context = images(stage=1)
    critic = build_critic(SgrCritic(kind="sgr"))(context)
    inputs = context.sample.clone().requires_grad_()
    bare, cut_off = context.hidden.detach(), context.hidden.detach().requires_grad_()
    for hidden, rider in ((bare, ()), (cut_off, torch.randn(6, 3, 8, 8))):
        with refused("critic-needs-gradient", UsageError, "critic sgr", "head"):
            local_loss(critic, View(inputs, hidden, torch.randint(CLASSES, (6,)), rider), cross_entropy)


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


@pytest.mark.parametrize("ignored", [IGNORED, 0, -1])
def test_the_consensus_counts_as_the_loss_does(images, ignored):
    """Targets that do not count change nothing: as if their samples were not there."""
    critic = build_critic(CollaborativeCritic(kind="collaborative", heads=3))(images())
    loss = find_loss({"kind": "cross_entropy", "ignore_index": ignored})
    hidden, target = images().hidden, torch.tensor([1, ignored, 3, ignored, 2, ignored])
    some = target != ignored
    whole, counted = (
        local_loss(critic, View((), *one), loss) for one in ((hidden, target), (hidden[some], target[some]))
    )
    torch.testing.assert_close(whole, counted)


def test_the_consensus_is_over_the_classes_of_every_position(context_of):
    """Classes in dimension 1, as many as positions."""
    network = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1))
    context = replace(context_of(network, torch.randn(2, 3, 4), 1), class_dim=1)
    critic = build_critic(CollaborativeCritic(kind="collaborative", heads=2))(context)
    hidden, target = context.hidden, torch.tensor([[1, 0, -100, -100], [2, -100, 3, 1]])
    rows = (target != IGNORED).nonzero().T.tolist()
    alone = hidden[rows[0], :, rows[1]][..., None]  # (5, 4, 1): every position that counts as a sample
    loss = find_loss(nn.CrossEntropyLoss())
    whole = local_loss(critic, View((), hidden, target), loss)
    torch.testing.assert_close(whole, local_loss(critic, View((), alone, target[tuple(rows)][:, None]), loss))


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_sgr(distance, images):
    """The distance between d L_k / d h_{k-1} and the delta that came along, by hand."""
    context = images(1)
    critic = build_critic(SgrCritic(kind="sgr", weight=0.3, distance=distance))(context)
    layer, before = nn.Conv2d(8, 8, 3, padding=1), torch.randn(6, 8, 8, 8, requires_grad=True)
    came = torch.randn(6, 8, 8, 8)
    view = View(before, layer(before), torch.randint(CLASSES, (6,)), came)
    label = F.cross_entropy(critic(view.hidden), view.target)
    (ours,) = torch.autograd.grad(label, before, create_graph=True)
    rows = []
    for one, other in zip(ours.flatten(1), came.flatten(1), strict=True):
        rows.append(
            1 - one @ other / one.norm() / other.norm()
            if distance == "cosine"
            else (one - other).norm() ** 2 / other.norm() ** 2
        )
    expected = label + 0.3 * torch.stack(rows).mean()
    found = critic.objective(view, cross_entropy)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [layer.weight, critic.base.linear.weight]
    mine = torch.autograd.grad(found, weights, retain_graph=True)
    for one, other in zip(mine, torch.autograd.grad(expected, weights), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_sgr_sends_its_own_delta_and_the_first_stage_is_an_ordinary_one(images):
    context = images()
    critic = build_critic(SgrCritic(kind="sgr"))(context)
    view = view_of(context)
    found = critic.objective(view, cross_entropy)
    label = F.cross_entropy(critic(view.hidden), view.target)
    (delta,) = torch.autograd.grad(label, view.hidden)
    assert found == label and torch.equal(critic.rider(view), delta)


def test_sgr_has_a_say_in_the_last_stage_too():
    settings = SgrCritic(kind="sgr")
    closing = build_critic(settings).closing()
    before = torch.randn(6, CLASSES, requires_grad=True)
    view = View(before, 2 * before, torch.randint(CLASSES, (6,)), torch.randn(6, CLASSES))
    assert torch.equal(closing(view.hidden), view.hidden) and not list(closing.parameters())
    assert closing.objective(view, cross_entropy) > F.cross_entropy(view.hidden, view.target)
    assert closing.rider(view) == () and build_critic(PredsimCritic(kind="predsim")).closing() is None


def test_reconstruct(context_of):
    network = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7))
    context = context_of(network, torch.ones(2, 5, dtype=torch.int64), 1)
    critic = build_critic(ReconstructCritic(kind="reconstruct", decoder="linear", weight=4.0))(context)
    assert critic.decoder.weight.std().item() == pytest.approx(0.1 / 6**0.5, rel=0.5)
    given, hidden, first = torch.randn(2, 5, 6), torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    rebuilt = hidden @ critic.decoder.weight.T + critic.decoder.bias
    found = local_loss(critic, View(given, hidden, ()), cross_entropy)
    assert found.item() == pytest.approx(4 * (rebuilt - given).square().mean().item(), rel=1e-5)
    found = local_loss(critic, View(torch.ones(2, 5, dtype=torch.int64), hidden, (), (), first), cross_entropy)
    assert found.item() == pytest.approx(4 * (rebuilt - first).square().mean().item(), rel=1e-5)
    with refused("critic-unfit", UsageError, "critic reconstruct"):
        local_loss(critic, View(torch.randn(2, 5, 4), hidden, (), (), torch.randn(2, 5, 4)), cross_entropy)


@pytest.fixture
def tokens(context_of):
    """Context of a token network of width 6 and 40 classes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 40))
    return context_of(network, torch.randint(40, (4, 5)), 1)


def token_view(context):
    target = torch.randint(40, (4, 5))
    target[1, 2] = -100
    return View(context.sample, context.hidden.clone().requires_grad_(), target)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_low_rank_projection(rank, tokens):
    critic = build_critic(VocabularyCritic(kind="vocabulary", rank=rank))(tokens)
    check_critic(critic, tokens)
    view = token_view(tokens)
    normal = F.layer_norm(view.hidden, (6,))
    logits = (normal @ critic.reduction.weight.T if rank else normal) @ critic.projection.weight.T
    assert torch.allclose(critic(view.hidden), logits, atol=1e-5)
    found = local_loss(critic, view, cross_entropy)
    assert found.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), view.target.flatten()).item(), rel=1e-5)


def test_the_loss_on_some_tokens_is_right_on_average(tokens):
    critic = build_critic(VocabularyCritic(kind="vocabulary", tokens=0.2))(tokens)
    view = token_view(tokens)
    view.target[1, 2] = 7
    torch.manual_seed(1)
    some = torch.stack([local_loss(critic, view, cross_entropy).detach() for _ in range(600)])
    whole = F.cross_entropy(critic(view.hidden).flatten(0, 1), view.target.flatten())
    assert some.std() > 0.01 and some.mean().item() == pytest.approx(whole.item(), abs=4 * some.std().item() / 600**0.5)


def test_ignored_tokens_are_not_drawn_where_others_are(tokens):
    """Masked language models: few positions count, and a share without any of them would have no loss."""
    critic = build_critic(VocabularyCritic(kind="vocabulary", tokens=0.2))(tokens)
    hidden = torch.randn(4, *tokens.hidden.shape[1:])
    target = torch.full(hidden.shape[:2], IGNORED)
    target[2, 1] = 3
    for seed in range(5):
        torch.manual_seed(seed)
        loss = critic.objective(View((), hidden, target, ()), cross_entropy)
        assert torch.allclose(loss, cross_entropy(critic(hidden), target))


def test_sampled_classes_estimate_the_normaliser(tokens):
    """exp(-loss) of one position is exp z_y / Z; the mean of the sampled Z over many draws is Z."""
    critic = build_critic(VocabularyCritic(kind="vocabulary", classes=10))(tokens)
    nn.init.normal_(critic.projection.weight)
    view = token_view(tokens)
    view.target[:] = -100
    view.target[2, 3] = 11
    logits = critic(view.hidden)[2, 3].detach()
    torch.manual_seed(2)
    losses = torch.stack([local_loss(critic, view, cross_entropy).detach() for _ in range(4000)])
    normalisers = losses.exp() * logits[11].exp()
    error = 4 * normalisers.std().item() / 4000**0.5
    assert error < 0.1 * logits.exp().sum() and normalisers.mean().item() == pytest.approx(
        logits.exp().sum().item(), abs=error
    )


def test_a_target_that_is_drawn_is_no_rival_of_itself(tokens):
    critic = build_critic(VocabularyCritic(kind="vocabulary", classes=39))(tokens)
    view = token_view(tokens)
    view.target[:] = 3
    with torch.no_grad():
        critic.projection.weight.zero_()
    assert local_loss(critic, view, cross_entropy).item() == pytest.approx(math.log(40), rel=1e-5)


def test_hashed_classes(tokens):
    critic = build_critic(VocabularyCritic(kind="vocabulary", buckets=9, hashes=2, rank=4))(tokens)
    check_critic(critic, tokens)
    view = token_view(tokens)
    rows = (F.layer_norm(view.hidden, (6,)) @ critic.reduction.weight.T @ critic.projection.weight.T).flatten(0, 1)
    first, second = rows[:, :9].log_softmax(-1), rows[:, 9:].log_softmax(-1)
    expected, total = torch.stack([first[:, critic.bucket_of[0]], second[:, critic.bucket_of[1]]]).sum(0), 0.0
    assert torch.allclose(critic(view.hidden).flatten(0, 1), expected, atol=1e-5)
    counted = [n for n, wanted in enumerate(view.target.flatten().tolist()) if wanted != -100]
    for n in counted:
        wanted = view.target.flatten()[n]
        total = total - first[n, critic.bucket_of[0, wanted]] - second[n, critic.bucket_of[1, wanted]]
    assert local_loss(critic, view, cross_entropy).item() == pytest.approx(total.item() / len(counted), rel=1e-5)
    assert len(counted) == 19


@pytest.mark.parametrize("options", [{"classes": 40}, {"buckets": 41}])
def test_no_fewer_classes_are_refused(options, tokens):
    with refused("too-few-classes", UsageError, "40 classes"):
        build_critic(VocabularyCritic(kind="vocabulary", **options))(tokens)


def test_a_vocabulary_critic_is_for_tokens(images):
    with refused("critic-unfit", UsageError, "critic vocabulary"):
        build_critic(VocabularyCritic(kind="vocabulary"))(images())


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
    with refused("critic-unfit", UsageError, f"critic {settings.kind} is for images"):
        build_critic(settings)(context_of(network, torch.randint(7, (2, 5)), 1))


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=lambda one: one.kind)
def test_targets_that_are_no_classes_are_refused(settings, images):
    context = images()
    view = view_of(context)
    view.target = torch.randn(6, CLASSES)
    with refused("critic-needs-class-indices", UsageError, f"critic {settings.kind}"):
        local_loss(build_critic(settings)(context), view, F.mse_loss)


def test_groups_must_divide(images):
    with refused("channels-not-divisible", UsageError, "8 channels", "3 groups"):
        build_critic(NeuronGroupsCritic(kind="neuron_groups", groups=3))(images())


def test_samples_that_do_not_count_are_as_if_they_were_not_there(context_of):
    torch.manual_seed(1)
    context = context_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(6, 8), 1)
    classes = torch.tensor([0, 3, 1, 2, 1, 0])
    rows = torch.tensor([0, 2, 3])
    for ignored in (-100, 9):
        loss = find_loss({"kind": "cross_entropy", "ignore_index": ignored})
        some = torch.full_like(classes, ignored).scatter(0, rows, classes[rows])
        for settings in (
            PredsimCritic(kind="predsim"),
            NeuronGroupsCritic(kind="neuron_groups", groups=2, base="head"),
        ):
            critic = build_critic(settings)(context)
            whole = local_loss(critic, View((), context.hidden, some), loss)
            part = local_loss(critic, View((), context.hidden[rows], classes[rows]), loss)
            torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("option", [{"classes": 5}, {"buckets": 4}])
def test_drawn_classes_and_the_index_that_the_loss_ignores(option, context_of):
    torch.manual_seed(1)
    context = context_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 20)), torch.randn(2, 6, 8), 1)
    critic = build_critic(VocabularyCritic(kind="vocabulary", **option))(context)
    tokens = torch.randint(20, (2, 6))
    found = []
    for ignored in (-100, 0):
        torch.manual_seed(2)
        loss = find_loss({"kind": "cross_entropy", "ignore_index": ignored})
        target = torch.where(tokens == 0, ignored, tokens)
        found.append(local_loss(critic, View((), context.hidden, target), loss))
    assert torch.equal(*found)
    with refused("critic-needs-unweighted-classes"):
        local_loss(critic, View((), context.hidden, tokens), find_loss({"kind": "cross_entropy", "weight": [1.0] * 20}))
