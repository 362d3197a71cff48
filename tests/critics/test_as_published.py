"""Defaults of critics against the numbers of their sources: layers, parameters, constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import View, local_loss
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.critics.head import LinearHead
from decoupled_pp.models import build_model
from decoupled_pp.pipeline.losses import cross_entropy
from decoupled_pp.settings.critics import AuglocalCritic, AutoCritic, LlsCritic, PredsimCritic, ReconstructCritic
from decoupled_pp.settings.sections import ResnetModel
from kit import refused

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


@pytest.mark.parametrize(
    ("settings", "kinds", "count"),
    [
        ({"depth": 1}, [nn.BatchNorm1d, nn.Linear], 2 * 64 + 64 * 10 + 10),
        ({"depth": 1, "norm": "never"}, [nn.Linear], 64 * 10 + 10),
        ({"depth": 2}, [nn.Linear], 64 * 10 + 10),
    ],
)
def test_auglocals_head(context_of, settings, kinds, count):
    """Source: Ma et al. 2024, the authors' code, `networks/auxiliary_nets.py`: pool, BatchNorm1d at depth 1, linear."""
    network = build_model(ResnetModel(kind="resnet", depth=20, width=16), DataInfo("image", (3, 16, 16), CLASSES))
    context = context_of(network, torch.randn(4, 3, 16, 16), 4)
    critic = build_critic(AuglocalCritic(kind="auglocal", **settings))(context)
    check_critic(critic, context)
    assert [type(layer) for layer in critic.head.children()] == kinds
    assert parameters(critic.head) == count
    features = torch.randn(4, 64, 4, 4)
    expected = features.mean((2, 3))
    if len(kinds) == 2:
        expected = F.batch_norm(expected, None, None, training=True)
    torch.testing.assert_close(critic.head(features), critic.head.linear(expected))


def test_a_shallow_auglocal_needs_two_samples(context_of):
    network = build_model(ResnetModel(kind="resnet", depth=8, width=4), DataInfo("image", (3, 8, 8), CLASSES))
    critic = build_critic(AuglocalCritic(kind="auglocal", depth=1))(context_of(network, torch.randn(2, 3, 8, 8), 1))
    with refused("batch-too-small", UsageError, "critic auglocal"):
        critic(torch.randn(1, 4, 8, 8))


def test_the_default_critic_has_no_norm_of_its_own(context_of):
    """Its depth is 2 in every stage, so published figures of `auto` hold."""
    network = build_model(ResnetModel(kind="resnet", depth=20, width=4), DataInfo("image", (3, 8, 8), CLASSES))
    for stage in range(7):
        critic = build_critic(AutoCritic())(context_of(network, torch.randn(2, 3, 8, 8), 1 + stage, stage, 8))
        assert (len(critic.layers), type(critic.head)) == (2, LinearHead)


@pytest.mark.parametrize(
    ("shape", "features", "kernel", "left"),
    [
        ((16, 28, 28), 2048, (4, 2), 1568),
        ((16, 32, 32), 2048, (4, 2), 2048),
        ((64, 7, 7), 2048, (2, 1), 1792),
        ((64, 32, 32), 2048, (8, 4), 2048),
        ((1024, 2, 2), 2048, (2, 1), 2048),
        ((16, 28, 28), 4096, (2, 2), 3136),
        ((64, 32, 32), 4096, (4, 4), 4096),
        ((9, 5, 2), 9, (8, 2), 9),  # not square: the side that can still be halved is
    ],
)
def test_predsim(judged, shape, features, kernel, left):
    """Source: Nokland & Eidnes 2019, the authors' code: kernels and features as it has them, zeros where none fits."""
    context = judged(*shape)
    critic = build_critic(PredsimCritic(kind="predsim", features=features))(context)
    check_critic(critic, context)
    channels = shape[0]
    assert (critic.pool.kernel_size, critic.prediction.in_features) == (kernel, left)
    assert (type(critic.projection), critic.projection.kernel_size) == (nn.Conv2d, (3, 3))
    assert parameters(critic) == 9 * channels * channels + left * CLASSES + CLASSES


def test_predsims_defaults_and_padding(judged):
    settings = PredsimCritic(kind="predsim")
    assert (settings.features, settings.similarity, settings.pooling) == (4096, 0.99, "rectangular")
    pool = build_critic(PredsimCritic(kind="predsim", features=2048))(judged(64, 7, 7)).pool
    rows = torch.arange(7.0)[:, None].expand(1, 64, 7, 7)
    assert pool(rows)[0, 0, :, 0].tolist() == [0, 1.5, 3.5, 5.5]  # a row of zeros above the first


def test_predsim_of_earlier_versions(judged):
    critic = build_critic(PredsimCritic(kind="predsim", features=2048, pooling="square"))(judged(64, 7, 7))
    assert critic.prediction.in_features == 576


@pytest.mark.parametrize(
    ("settings", "shape", "names"),
    [
        (LlsCritic(kind="lls", vectors="whole"), (8,), {"basis": (CLASSES, 8)}),
        (
            ReconstructCritic(kind="reconstruct", decoder="linear"),
            (8,),
            {"decoder.weight": (8, 8), "decoder.bias": (8,)},
        ),
        (
            PredsimCritic(kind="predsim", features=64, pooling="square"),
            (8, 5, 5),
            {"projection.weight": (8, 8, 3, 3), "prediction.weight": (CLASSES, 32), "prediction.bias": (CLASSES,)},
        ),
        (
            AuglocalCritic(kind="auglocal", depth=1, norm="never"),
            (8, 5, 5),
            {"head.linear.weight": (CLASSES, 8), "head.linear.bias": (CLASSES,)},
        ),
    ],
    ids=lambda one: getattr(one, "kind", None),
)
def test_earlier_forms_have_the_names_of_earlier_checkpoints(judged, settings, shape, names):
    """So their critics are taken over where the earlier form is named (names and shapes of version 0.1.0)."""
    state = build_critic(settings)(judged(*shape)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == names
