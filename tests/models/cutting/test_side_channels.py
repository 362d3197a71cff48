"""What passes between layers beside the payload is found where it would be cut, and nothing else is taken for it."""

import random
import threading

import numpy
import pytest
import torch
from torch import nn

from decoupled_pp import Trainer, partition
from decoupled_pp.core.errors import UsageError
from kit import ignore, refused

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.zeros(4, 6, dtype=torch.int64)
PLACE = threading.local()


class Keep(nn.Module):
    """Leaves its input somewhere."""

    def __init__(self, leave):
        super().__init__()
        self.leave = leave

    def forward(self, x):
        self.leave(self, x)
        return x


class Use(nn.Module):
    """Adds what was left there."""

    def __init__(self, find):
        super().__init__()
        self.find = find

    def forward(self, x):
        return x + self.find()


def a_global(change):
    return Keep(lambda _, x: setattr(PLACE, "x", change(x))), Use(lambda: PLACE.x)


def an_attribute(change):
    keeping = Keep(lambda self, x: setattr(self, "left", change(x)))
    return keeping, Use(lambda: keeping.left)


def a_buffer(change):
    keeping = Keep(lambda self, x: self.left.copy_(change(x)))
    keeping.register_buffer("left", torch.zeros(4, 8))
    return keeping, Use(lambda: keeping.left)


@pytest.mark.parametrize("change", [lambda x: x, torch.detach, lambda x: x.mean()], ids=["graph", "values", "scalar"])
@pytest.mark.parametrize("channel", [a_global, an_attribute, a_buffer])
def test_a_channel_is_refused_by_the_names_of_its_layers_and_the_cut_named_in_the_remedy_works(channel, change):
    if channel is a_buffer:
        change = torch.detach
    keeping, using = channel(change)
    layers = [nn.Linear(8, 8), keeping, nn.Linear(8, 8), using, nn.Linear(8, 3)]
    with refused("layers-share-more-than-payload", UsageError, "layer '3' (Use)", "layer '1' (Keep)"):
        partition(layers, 2, [2, 3], X)
    trainer = Trainer(partition(layers, 2, [1, 4], X), critic="head", device="cpu", observer=ignore)
    trainer.fit([(X, torch.arange(4) % 3)], 2)


class InTraining(nn.Module):
    """A layer that does its work in training mode alone, behind dropout."""

    def __init__(self, layer):
        super().__init__()
        self.dropout, self.layer = nn.Dropout(0.5), layer

    def forward(self, x):
        return self.layer(self.dropout(x)) if self.training else x


@pytest.mark.parametrize("evaluated", [False, True], ids=["as built", "as from_pretrained"])
def test_a_channel_in_training_mode_alone_is_refused(evaluated):
    keeping, using = a_global(torch.detach)
    layers = [nn.Linear(8, 8), InTraining(keeping), nn.Linear(8, 8), InTraining(using), nn.Linear(8, 3)]
    generator = torch.get_rng_state()
    network = nn.Sequential(*layers).train(not evaluated)
    with refused("layers-share-more-than-payload", UsageError, "layer '3' (InTraining)", "layer '1' (InTraining)"):
        partition(network, 2, [2, 3], X)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(part.training != evaluated for part in network.modules())
    partition(network, 2, [1, 4], X)


def test_whole_numbers_that_are_all_alike():
    """As in a run, whose sample is of zeros."""
    keeping, using = a_global(lambda x: x.float()[..., None])
    with refused("layers-share-more-than-payload", UsageError, "'0'", "'2'"):
        partition([keeping, nn.Embedding(9, 8), using, nn.Linear(8, 9)], 2, [2, 2], TOKENS)


class Carry(nn.Module):
    """Goes on from its own last result, which is its own affair."""

    before = None

    def forward(self, x):
        self.before = x if self.before is None else (x + self.before) / 2
        return self.before


class Random(nn.Module):
    """Draws numbers in evaluation mode, too."""

    def forward(self, x):
        return x + torch.randn_like(x)


class Skips(nn.Module):
    """Leaves itself out at random in training, as layerdrop does; who draws the number is its own affair."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + 1 if self.training and self.draw() < 0.5 else x


SKIPS = [lambda: Skips(random.random), lambda: Skips(lambda: float(torch.rand(()))), lambda: Skips(numpy.random.rand)]


class Counter:
    """An object of one's own, which the layer moves on in training."""

    count = 0


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = Counter()

    def forward(self, x):
        self.steps.count += self.training
        return x * (1 + self.steps.count)


def test_looking_in_training_mode_moves_nothing():
    layers = [nn.Linear(8, 8), Counts(), nn.BatchNorm1d(8), Counts(), nn.Linear(8, 3)]
    generators = random.getstate(), numpy.random.get_state()[1].tolist()
    partition(layers, 3, [1, 2, 2], X)
    assert [layers[1].steps.count, layers[3].steps.count, int(layers[2].num_batches_tracked)] == [0, 0, 0]
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == generators


class Cache(nn.Module):
    """Keeps a table by size for all modules of its kind."""

    tables = {}  # noqa: RUF012 - shared on purpose

    def forward(self, x):
        return x * self.tables.setdefault(x.shape[1], torch.arange(x.shape[1]))


@pytest.mark.parametrize("layer", [Carry, Random, Cache, lambda: nn.BatchNorm1d(8), lambda: nn.Dropout(0.5), *SKIPS])
def test_other_state_is_no_channel(layer):
    layers = [nn.Linear(8, 8), layer(), nn.Linear(8, 8), layer(), nn.Linear(8, 3)]
    generator = torch.get_rng_state()
    plan = partition(layers, 3, "uniform", X)
    assert plan.stages == 3
    assert torch.equal(torch.get_rng_state(), generator)
