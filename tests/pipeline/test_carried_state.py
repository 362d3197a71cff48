"""Layers that carry state from packet to packet: evaluations in between change nothing that trains."""

import copy

import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.module_state import KeptState, move
from kit import differences, ignore, states, vector_batches

BATCHES = vector_batches(8, 4, 6, 3)


class Carry(nn.Module):
    """A recurrent layer over a stream."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, rows):
        made = torch.tanh(self.linear(rows) + self.before())
        self.remember(made.detach())
        return made


class InBuffer(Carry):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(4, 6))

    def before(self):
        return self.kept

    def remember(self, made):
        self.kept = made.clone()


class InPlace(InBuffer):
    def remember(self, made):
        self.kept.copy_(made)


class InAttribute(Carry):
    kept = 0.0

    def before(self):
        return self.kept

    def remember(self, made):
        self.kept = made


class InTuple(Carry):
    def __init__(self):
        super().__init__()
        self.state = (torch.zeros(4, 6), 0)

    def before(self):
        return self.state[0] / (1 + self.state[1])

    def remember(self, made):
        self.state = (made, self.state[1] + 1)


class InTuplesTensor(InTuple):
    def remember(self, made):
        self.state[0].copy_(made)


class InList(Carry):
    def __init__(self):
        super().__init__()
        self.past = [torch.zeros(4, 6)]

    def before(self):
        return self.past[0]

    def remember(self, made):
        self.past.insert(0, made)


class InDictionary(Carry):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def before(self):
        return self.cache.get("made", 0.0)

    def remember(self, made):
        self.cache["made"] = made
        self.cache[len(self.cache)] = made


KINDS = [InBuffer, InPlace, InAttribute, InTuple, InTuplesTensor, InList, InDictionary]


def trained(kind, **options):
    torch.manual_seed(0)
    plan = partition([kind(), nn.Linear(6, 6), nn.Linear(6, 3)], 2, "uniform", BATCHES[0][0])
    trainer = Trainer(
        plan, critic=lambda _: nn.Sequential(kind(), nn.Linear(6, 3)), seed=1, device="cpu", observer=ignore
    )
    trainer.fit(BATCHES, 4, **options)
    if options:
        trainer.evaluate(BATCHES[:3])
    trainer.fit(BATCHES, 4, **options)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_change_nothing_that_trains(kind):
    watched = trained(kind, validate=BATCHES[2:5], validate_every=2)
    assert differences(states(watched), states(trained(kind))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_leaves_no_state_of_the_sample(kind):
    layer = kind()
    before = copy.deepcopy({key: value for key, value in vars(layer).items() if not key.startswith("_")})
    partition([layer, nn.Linear(6, 3)], 2, "uniform", BATCHES[0][0])
    now = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    assert repr(now) == repr(before)


def test_parameters_are_no_carried_state():
    layer = nn.Linear(2, 2)
    layer.alias = [layer.weight]
    kept = KeptState(layer)
    with torch.no_grad():
        layer.weight.zero_()
    kept.restore()
    assert not layer.weight.any()
    assert layer.alias[0] is layer.weight


def test_tensors_that_are_attributes_move_with_their_module():
    layer = nn.LSTM(2, 2)
    layer.table = torch.ones(2)
    layer.pair = (torch.ones(1), {"x": [torch.ones(3)]})
    layer.count = 3
    move(layer, torch.device("meta"))
    assert layer.table.is_meta and layer.pair[0].is_meta and layer.pair[1]["x"][0].is_meta
    assert layer.count == 3
    assert all(parameter.is_meta for parameter in layer.parameters())
