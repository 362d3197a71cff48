"""The networks: parameter counts, shapes, names, causality, refusals."""

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import count_parameters
from decoupled_pp.models import build_model
from decoupled_pp.settings.sections import FactoryModel, GptModel, MlpModel, ResnetModel, VggModel
from kit import refused

IMAGES = DataInfo("image", (3, 32, 32), 10)
DIGITS = DataInfo("image", (1, 8, 8), 10)
TOKENS = DataInfo("tokens", (16,), 65)
VECTORS = DataInfo("vector", (20,), 7)


def names(module):
    return [name for name, _ in module.named_children()]


@pytest.mark.parametrize(("depth", "millions", "exact"), [(20, 0.27, 269722), (56, 0.85, 853018), (110, 1.7, 1727962)])
def test_resnet_has_the_published_parameters(depth, millions, exact):
    """He et al. 2016, table 6 (two digits)."""
    count = count_parameters(build_model(ResnetModel(kind="resnet", depth=depth), IMAGES))
    assert count == exact
    assert f"{count / 1e6:.2g}" == str(millions)


def test_vgg_has_the_published_parameters():
    """Lee & Lee say 7.86M: ours without the scales and shifts of batch normalisation."""
    network = build_model(VggModel(kind="vgg"), IMAGES)
    norms = sum(count_parameters(part) for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    assert count_parameters(network) == 7_867_594
    assert int((count_parameters(network) - norms) / 1e4) == 786


def test_gpt_parameter_count():
    """12 D^2 + 13 D per block, two untied V x D matrices, positions, final norm."""
    depth, width, vocabulary, context = 3, 32, 65, 16
    network = build_model(GptModel(kind="gpt", width=width, depth=depth, heads=4), TOKENS)
    blocks = depth * (12 * width**2 + 13 * width)
    assert count_parameters(network) == blocks + 2 * vocabulary * width + context * width + 2 * width
    assert network.embedding.token.weight is not network.head.projection.weight


@pytest.mark.parametrize("info", [IMAGES, DIGITS])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ResnetModel(kind="resnet", depth=8, width=4), ["stem", "block0", "block1", "block2", "head"]),
        (VggModel(kind="vgg", width=4), [f"layer{i}" for i in range(11)] + ["head"]),
        (MlpModel(kind="mlp", width=8, depth=2, dropout=0.5), ["hidden0", "hidden1", "head"]),
    ],
)
def test_image_networks(settings, expected, info):
    network = build_model(settings, info)
    assert names(network) == expected
    assert network(torch.randn(2, *info.shape)).shape == (2, 10)
    assert not any(getattr(part, "inplace", False) for part in network.modules())
    assert all(count_parameters(layer) for layer in network)


def test_resnet_groups():
    network = build_model(ResnetModel(kind="resnet", depth=14, width=4), IMAGES)
    hidden, shapes = torch.randn(2, 3, 32, 32), []
    for layer in network:
        hidden = layer(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(4, 32, 32)] * 3 + [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2 + [(10,)]


def test_mlp_takes_vectors():
    assert build_model(MlpModel(kind="mlp", width=8, depth=2), VECTORS)(torch.randn(2, 20)).shape == (2, 7)


def test_gpt_is_causal_and_sees_the_past():
    torch.manual_seed(0)
    network = build_model(GptModel(kind="gpt", width=32, depth=2, heads=4), TOKENS).eval()
    tokens = torch.randint(65, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 65
    before, after = network(tokens), network(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert all((before[:, at] != after[:, at]).any() for at in range(9, 16))


def test_gpt_initial_weights():
    torch.manual_seed(0)
    network = build_model(GptModel(kind="gpt", width=128, depth=8, heads=4), DataInfo("tokens", (16,), 300))
    assert network.block3.expansion.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.block3.contraction.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert network.block3.attention.projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert network.head.projection.weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05)
    loss = nn.functional.cross_entropy(network(torch.randint(300, (32, 16))).flatten(0, 1), torch.randint(300, (512,)))
    # Logits of variance 1/3 cost half of it, log E exp z, on top of log V.
    assert loss.item() == pytest.approx(torch.tensor(300.0).log().item() + 1 / 6, abs=0.1)


def test_gpt_refuses_more_than_its_context():
    network = build_model(GptModel(kind="gpt", width=8, depth=1, heads=1), TOKENS)
    with refused("context-exceeded", UsageError, "16 tokens but got 17"):
        network(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "info", "code"),
    [
        (GptModel(kind="gpt"), IMAGES, "model-data-mismatch"),
        (ResnetModel(kind="resnet"), TOKENS, "model-data-mismatch"),
        (VggModel(kind="vgg"), VECTORS, "model-data-mismatch"),
        (MlpModel(kind="mlp"), TOKENS, "model-data-mismatch"),
        (ResnetModel(kind="resnet"), DataInfo("image", (32, 32), 10), "bad-data-info"),
    ],
)
def test_refuses_data_that_do_not_fit(settings, info, code):
    with refused(code, UsageError, info.form):
        build_model(settings, info)


def make_network(info, width, form="list"):
    layers = [nn.Linear(info.shape[0], width), nn.Linear(width, info.outputs)]
    if form == "split":
        return dpp.split_traced(nn.Sequential(*layers), torch.randn(2, *info.shape), ["0"])
    return {"list": layers, "sequential": nn.Sequential(*layers), "number": 3, "empty": []}[form]


@pytest.mark.parametrize("form", ["list", "sequential", "split"])
def test_factory(form):
    settings = FactoryModel(kind="factory", factory=f"{__name__}:make_network", arguments={"width": 5, "form": form})
    network = build_model(settings, VECTORS)
    assert isinstance(network, nn.Sequential)
    assert network(torch.randn(2, 20)).shape == (2, 7)


@pytest.mark.parametrize("form", ["number", "empty"])
def test_factory_returning_something_else(form):
    settings = FactoryModel(kind="factory", factory=f"{__name__}:make_network", arguments={"width": 5, "form": form})
    with refused("factory-wrong-result"):
        build_model(settings, VECTORS)
