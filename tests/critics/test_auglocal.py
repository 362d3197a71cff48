"""AugLocal: which layers, how deep, fresh weights, rebuilt layers, refusals."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.critics import build_critic, check_critic
from decoupled_pp.critics.auglocal import pyramidal_depth, sampled_indices
from decoupled_pp.models import build_model
from decoupled_pp.settings.critics import AuglocalCritic, HeadCritic
from decoupled_pp.settings.sections import GptModel, ResnetModel, VggModel
from kit import refused


def builder(depth, pyramid=0.5):
    return build_critic(AuglocalCritic(kind="auglocal", depth=depth, pyramid=pyramid))


def test_indices_follow_the_rule():
    """Exact rational arithmetic as the reference."""
    for layers in range(1, 40):
        for last in range(layers):
            for depth in range(1, 12):
                remaining = layers - 1 - last
                rule = [round(last + Fraction(remaining, depth) * i) for i in range(1, depth + 1)]
                expected = rule if depth < remaining else list(range(last + 1, layers))
                found = list(sampled_indices(last, layers, depth))
                assert found == expected
                assert found == sorted(set(found))
                assert not found or (found[0] > last and found[-1] == layers - 1)


@pytest.mark.parametrize(
    ("last", "layers", "depth", "expected"),
    [
        (0, 13, 3, (4, 8, 12)),  # n-l-1 = 12 in steps of 4
        (2, 13, 4, (4, 7, 10, 12)),  # 4.5, 7, 9.5, 12: halves to even
        (0, 56, 6, (9, 18, 28, 37, 46, 55)),  # steps of 55/6
        (10, 13, 2, (11, 12)),
        (11, 13, 5, (12,)),
        (12, 13, 5, ()),
        (3, 12, 1, (11,)),
    ],
)
def test_indices_by_hand(last, layers, depth, expected):
    assert sampled_indices(last, layers, depth) == expected


@pytest.mark.parametrize(
    ("depth", "pyramid", "stages", "expected"),
    [
        (5, 0.5, 6, [5, 4, 4, 4, 3]),  # 5, 4.5, 4, 3.5, 3
        (9, 0.5, 4, [9, 7, 5]),
        (6, 1.0, 4, [6, 4, 1]),  # 6, 3.5, 1
        (6, 0.0, 4, [6, 6, 6]),
        (1, 0.5, 5, [1, 1, 1, 1]),
        (4, 0.5, 2, [4]),
    ],
)
def test_depth_by_hand(depth, pyramid, stages, expected):
    assert [pyramidal_depth(depth, pyramid, stage, stages) for stage in range(stages - 1)] == expected


def test_resnet_blocks_are_sampled_and_rebuilt(context_of):
    network = build_model(ResnetModel(kind="resnet", depth=20, width=4), DataInfo("image", (3, 16, 16), 10))
    # n = 10 layers without the head; the stage ends with layer 0 (the stem): 3, 6, 9.
    critic = builder(3)(context_of(network, torch.randn(2, 3, 16, 16), 1))
    hidden, shapes = torch.randn(2, 4, 16, 16), []
    for layer in critic.layers:
        hidden = layer(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
    assert [type(layer).__name__ for layer in critic.layers] == ["Block"] * 3
    assert [layer.stride for layer in critic.layers] == [1, 2, 2]


def test_vgg_layers_are_rebuilt(context_of):
    network = build_model(VggModel(kind="vgg", width=4), DataInfo("image", (3, 32, 32), 10))
    # n = 11, l = 0: 5 and 10, of 16 and 32 channels.
    critic = builder(2)(context_of(network, torch.randn(2, 3, 32, 32), 1))
    convolutions = [layer.convolution for layer in critic.layers]
    assert [(part.in_channels, part.out_channels, part.stride[0]) for part in convolutions] == [(4, 16, 2), (16, 32, 2)]


def test_copies_of_gpt_blocks_are_fresh_and_initialised_as_in_the_network(context_of):
    network = build_model(GptModel(kind="gpt", width=64, depth=8, heads=2), DataInfo("tokens", (8,), 11))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    critic = builder(2)(context_of(network, torch.randint(11, (2, 8)), 1))
    assert len(critic.layers) == 2
    assert not any((parameter == 7).all() for parameter in critic.parameters())
    assert critic.layers[0].contraction.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert critic.layers[1].expansion.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(critic.layers[0].expansion.weight, critic.layers[1].expansion.weight)


def test_frozen_and_in_place_layers_become_trainable_and_pure(context_of):
    network = nn.Sequential(
        nn.Linear(6, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )
    network[1].requires_grad_(False)
    where = context_of(network, torch.randn(2, 6), 1)
    kept = where.hidden.clone()
    critic = builder(5)(where)
    critic(where.hidden)
    assert (kept < 0).any()
    assert torch.equal(kept, where.hidden)
    check_critic(critic, where)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert network[1][0].inplace
    assert not network[1][1].weight.requires_grad


def test_torch_layers_with_attention_are_made_fresh(context_of):
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 5)).train()
    with torch.no_grad():
        for parameter in network[3].parameters():
            parameter.fill_(7.0)
    where = context_of(network, torch.randn(2, 6, 4), 1)
    critic = builder(1)(where)
    assert not any((parameter == 7).all() for parameter in critic.parameters())
    check_critic(critic, where)


def test_layers_with_tuples(context_of):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, pair):
            return self.linear(pair[0]), pair[1]

    class Start(nn.Module):
        def forward(self, tensor):
            return tensor, tensor.new_ones(len(tensor))

    class End(nn.Module):
        def forward(self, pair):
            return pair[0][:, :3]

    where = context_of(nn.Sequential(Start(), Pair(), Pair(), Pair(), End()), torch.randn(2, 6), 2)
    critic = builder(1)(where)
    check_critic(critic, where)


def test_refuses_a_layer_it_cannot_fit(context_of):
    network = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(4, 9)))
    with refused("layer-not-copyable", UsageError, "layer 3 (Linear)", "(2, 5)", "(2, 7)"):
        builder(1)(context_of(network, torch.randn(2, 4), 1))
    critic = builder(9)(context_of(network, torch.randn(2, 4), 1))
    assert len(critic.layers) == 3


def test_refuses_parameters_that_nothing_resets(context_of):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, hidden):
            return hidden * self.scale

    network = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), Scale()), nn.Linear(6, 3))
    with refused("layer-not-copyable", UsageError, "layer 1.1 (Scale)", "'scale'"):
        builder(1)(context_of(network, torch.randn(2, 6), 1))


def test_needs_the_hiddens():
    context = CriticContext(0, 2, 1, torch.randn(2, 6), torch.randn(2, 3), (nn.Linear(6, 6),) * 3)
    with refused("critic-context-incomplete"):
        builder(1)(context)


def variant(**settings):
    return build_critic(AuglocalCritic(kind="auglocal", **settings))


def test_a_narrow_critic_at_reduced_resolution(context_of):
    """Pool to 7x7, project 8 channels to 4, then blocks of half the channels of those sampled (6 and 9, the last)."""
    network = build_model(ResnetModel(kind="resnet", depth=20, width=8), DataInfo("image", (1, 28, 28), 10))
    critic = variant(depth=2, resolution=7, width=0.5)(context_of(network, torch.randn(2, 1, 28, 28), 4))
    hidden, shapes = torch.randn(2, 8, 28, 28), []
    for part in (*critic.narrowing, *critic.layers, critic.head):
        hidden = part(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(8, 7, 7), (4, 7, 7), (8, 4, 4), (16, 2, 2), (10,)]
    small = torch.randn(2, 8, 5, 5)
    assert torch.equal(critic.narrowing[0](small), small)


def test_a_narrow_critic_of_tokens(context_of):
    network = build_model(GptModel(kind="gpt", width=32, depth=4, heads=4), DataInfo("tokens", (6,), 11))
    critic = variant(depth=2, width=0.25)(context_of(network, torch.zeros(2, 6, dtype=torch.int64), 2))
    assert [(block.attention.heads, block.expansion.in_features) for block in critic.layers] == [(1, 8), (1, 8)]
    assert critic(torch.randn(2, 6, 32)).shape == (2, 6, 11)


@pytest.mark.parametrize("depth", [1, 3])
def test_copies_that_begin_with_the_networks_weights(context_of, depth):
    """With all layers above copied, the critic says at once what the network says; and has weights of its own."""
    network = build_model(GptModel(kind="gpt", width=8, depth=4, heads=2), DataInfo("tokens", (6,), 11))
    context = context_of(network, torch.randint(11, (2, 6)), 2)
    critic = variant(depth=depth, weights="network", pyramid=0)(context)
    chosen = {1: (network[4],), 3: (network[2], network[3], network[4])}[depth]
    expected = context.hidden
    for layer in (*chosen, network[-1]):
        expected = layer(expected)
    assert torch.equal(critic(context.hidden), expected)
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in network.parameters()}


def test_a_head_that_begins_with_the_networks_weights(context_of):
    network = build_model(GptModel(kind="gpt", width=8, depth=4, heads=2), DataInfo("tokens", (6,), 11))
    context = context_of(network, torch.randint(11, (2, 6)), 2)
    head = build_critic(HeadCritic(weights="network"))(context)
    assert torch.equal(head(context.hidden), network[-1](context.hidden))


@pytest.mark.parametrize(
    ("settings", "code", "part"),
    [
        (AuglocalCritic(kind="auglocal", resolution=4), "critic-unfit", "`critic.resolution` 4"),
        (AuglocalCritic(kind="auglocal", width=0.5), "critic-unfit", "`critic.width` 0.5"),
        (HeadCritic(weights="network"), "critic-unfit", "`critic.weights` fresh"),
        (AuglocalCritic(kind="auglocal", depth=1, weights="network"), "layer-not-copyable", "`critic.weights` fresh"),
    ],
)
def test_options_that_do_not_fit(context_of, settings, code, part):
    network = nn.Sequential(*(nn.Linear(width, width + 1) for width in range(4, 9)))
    with refused(code, UsageError, part):
        build_critic(settings)(context_of(network, torch.randn(2, 4), 1))
