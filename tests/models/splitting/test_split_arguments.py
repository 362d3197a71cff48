"""Odd arguments of the splitting functions are refused in one line that names the argument."""

import numpy
import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from decoupled_pp.core.errors import UsageError


class Chain(nn.Module):
    """A model with blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 4)
NO_MODELS = [Chain, None, "gpt2", 3, {"a": nn.Linear(4, 4)}, len]
NO_NAMES = [None, "blocks.1", 2, [1], [None], {"blocks.1": 0}, {"blocks.1"}]
NO_STAGES = [None, "blocks.1", -1, 0, True, 2.0, [], [1], {"blocks.1": 0}, {"blocks.1"}, numpy.int64(0)]

ODD = [
    *(("model", lambda it=it: dpp.split(it, X)) for it in [*NO_MODELS, [], ["a"], [nn.ReLU]]),
    *(("model", lambda it=it: dpp.split_blocks(it, X)) for it in [*NO_MODELS, [nn.ReLU()]]),
    *(("model", lambda it=it: dpp.split_traced(it, X, ["blocks.1"])) for it in [*NO_MODELS, [nn.ReLU()]]),
    *(("stages", lambda it=it: dpp.split(Chain(), X, it)) for it in NO_STAGES),
    *(("cut_after", lambda it=it: dpp.split_traced(Chain(), X, it)) for it in NO_NAMES),
    ("output", lambda: dpp.split(Chain(), X, output="logits")),
    ("output", lambda: dpp.split_blocks(Chain(), X, output="logits")),
    ("output", lambda: dpp.split_traced(Chain(), X, ["blocks.1"], output="logits")),
    ("options", lambda: dpp.split(Chain(), X, options=["a"])),
    ("options", lambda: dpp.split_blocks(Chain(), X, options=["a"])),
]


@pytest.mark.parametrize(("argument", "call"), ODD)
def test_an_odd_argument_is_refused_by_name_in_one_line(argument, call):
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{argument}: ") and "; give " in text and "\n" not in text


@pytest.mark.parametrize("sample", [None, "x", 3, (), {}, numpy.zeros((2, 4)), {"y": X}, X[:, :3], (X, X)])
@pytest.mark.parametrize(
    "function", [dpp.split, dpp.split_blocks, lambda model, sample: dpp.split_traced(model, sample, ["blocks.1"])]
)
def test_an_odd_sample_is_refused(function, sample):
    with pytest.raises(UsageError):
        function(Chain(), sample)


def test_more_stages_than_layers_are_refused_with_the_number():
    with pytest.raises(UsageError, match="too few for 9 stages"):
        dpp.split(Chain(), X, 9)


def test_a_number_of_numpy_is_a_number():
    assert str(dpp.split(Chain(), X, numpy.int64(2))) == str(dpp.split(Chain(), X, 2))
