"""What layers share as whole modules: after `untie` every layer has its own, and the cut takes them."""

import torch
from torch import nn

from decoupled_pp import Trainer, partition, untie
from kit import ignore

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Uses a module that other blocks use, twice."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.second = shared, nn.ModuleList([shared])

    def forward(self, x):
        return self.second[0](torch.tanh(self.first(x)))


def test_a_shared_module_becomes_one_for_each_layer():
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    layers = [Block(shared) for _ in range(3)]
    expected = nn.Sequential(*layers).eval()(X)
    untied = untie(layers)
    assert torch.equal(untied.eval()(X), expected)
    assert layers[0].first is shared
    assert layers[1].first is layers[1].second[0] is not shared
    assert untied.tied == {
        f"{k}.first.{name}": f"0.first.{name}" for k in (1, 2) for name, _ in shared.named_parameters()
    }
    plan = partition([*untied, nn.Linear(6, 3)], 2, "uniform", X)
    Trainer(plan, critic="head", device="cpu", observer=ignore).fit([(X, torch.arange(4) % 3)], 2)


def test_a_shared_buffer_becomes_one_for_each_layer():
    layers = [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]
    layers[1].running_mean = layers[0].running_mean
    untie(layers)
    assert layers[1].running_mean is not layers[0].running_mean
