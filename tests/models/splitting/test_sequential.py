"""Nested Sequentials, flattened and marked."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError
from kit import refused

SAMPLE = torch.randn(4, 6)


def nested():
    """layer1 (1 layer), layer2 (2), layer3 (2, the second of two), head: six layers."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    parts = {
        "layer1": nn.Linear(6, 6),
        "layer2": nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
        "layer3": nn.Sequential(nn.Linear(6, 6), inner),
        "head": nn.Linear(6, 3),
    }
    return nn.Sequential(OrderedDict(parts))


def test_flattened_layers_keep_their_names_and_weights():
    network = nested()
    flat = dpp.flatten(network)
    assert list(flat._modules) == ["layer1", "layer2.0", "layer2.1", "layer3.0", "layer3.1.0", "layer3.1.1", "head"]
    assert list(flat.state_dict()) == list(network.state_dict())
    assert all(one is other for one, other in zip(flat.parameters(), network.parameters(), strict=True))
    assert torch.equal(flat(SAMPLE), network(SAMPLE))
    network.load_state_dict(nested().state_dict())
    flat.load_state_dict(nested().state_dict())


@pytest.mark.parametrize("by", ["uniform", "parameters", "time"])
@pytest.mark.parametrize("critic", [None, "head"])
def test_as_many_marks_as_cuts_are_the_cut(by, critic):
    network = dpp.cut_after(nested(), ["layer2", "layer3.1.0"])
    plan = dpp.partition(network, 3, by, SAMPLE, critic=critic, device="cpu")
    assert plan.boundaries == (0, 3, 5, 7)


@pytest.mark.parametrize("by", ["uniform", "parameters", "time"])
@pytest.mark.parametrize("critic", [None, "head"])
def test_of_more_marks_the_balanced_ones_are_taken(by, critic):
    network = dpp.cut_after(nested(), ["layer1", "layer2", "layer3"])
    plan = dpp.partition(network, 2, by, SAMPLE, critic=critic, device="cpu")
    assert plan.boundaries[1] in {1, 3, 6}
    if by != "time":
        assert plan.boundaries == (0, 3, 7)


def test_a_list_of_sizes_wins_over_marks():
    assert dpp.partition(dpp.cut_after(nested(), ["layer2"]), 2, [1, 6], SAMPLE).boundaries == (0, 1, 7)


def test_a_marked_network_trains_and_exports_under_its_own_names():
    network = nested()
    trainer = dpp.Trainer(dpp.partition(dpp.cut_after(network, ["layer2"]), 2, "uniform", SAMPLE), device="cpu")
    trainer.fit([(SAMPLE, torch.tensor([0, 1, 2, 0]))], steps=3)
    assert list(trainer.export().state_dict()) == list(nested().state_dict())


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["layer9"], "'layer9' is no layer of the network; its layers are layer1, layer2.0"),
        (["layer"], "'layer' is no layer"),
        (["head"], "'head' is the end of the network"),
        (["layer2", "layer1"], "'layer1' does not come after"),
    ],
)
def test_wrong_marks_are_named(names, part):
    with refused("bad-cut-point", UsageError, part):
        dpp.cut_after(nested(), names)


def test_too_few_marks_are_named():
    with refused("too-few-cut-places"):
        dpp.partition(dpp.cut_after(nested(), ["layer2"]), 3, "uniform", SAMPLE)


def test_what_is_no_sequential_is_refused():
    with refused("not-a-layer-list", UsageError, "TransformerEncoderLayer"):
        dpp.flatten(nn.TransformerEncoderLayer(8, 2))
