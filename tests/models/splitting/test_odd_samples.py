"""Odd samples and names, and odd arguments of what cuts: each is served, or refused in one line with the cure."""

import numpy as np
import pytest
import torch
from torch import nn

import decoupled_pp as dpp
from kit import refused

X = torch.randn(2, 4)


class Net(nn.Module):
    """Blocks, and code between them: split by tracing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return x


def chain():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def in_words(model, sample):
    """Call `split_transformers`, which takes inputs by name."""
    return dpp.split_transformers(model, sample if isinstance(sample, dict) or sample is None else {"x": sample})


MODEL_TAKERS = {
    "split": dpp.split,
    "split_blocks": dpp.split_blocks,
    "split_traced": lambda model, sample: dpp.split_traced(model, sample, ["blocks.1"]),
    "split_transformers": in_words,
}
BAD_SAMPLES = {
    "None": (None, "no-sample"),
    "a text": ({"x": "a"}, "no-sample"),
    "lists of numbers": ({"x": [[1, 2]]}, "no-sample"),
    "nothing": ({}, "no-sample"),
    "an array": ({"x": np.zeros((2, 4))}, "bad-sample"),
    "an array beside tensors": ({"x": X, "attention_mask": np.ones((2, 4))}, "bad-sample"),
    "numbers as keys": ({1: X}, "bad-sample"),
    "no samples": (X[:0], "bad-sample"),
    "shapes only": (X.to("meta"), "bad-sample"),
}


@pytest.mark.parametrize("model", [Net, None, "gpt2", [nn.ReLU()], {}])
def test_split_transformers_refuses_what_is_no_model(model):
    with pytest.raises(dpp.UsageError, match=r"^model: .*; give "):
        dpp.split_transformers(model, {"x": X})


@pytest.mark.parametrize(("sample", "code"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
@pytest.mark.parametrize("take", MODEL_TAKERS.values(), ids=MODEL_TAKERS)
def test_what_is_no_sample_is_refused(take, sample, code):
    with refused(code, dpp.UsageError, "sample: "):
        take(Net(), sample)


@pytest.mark.parametrize("sample", [X.double(), X.long(), X[:, :3], (X, X), {"y": X}, torch.tensor(1.0)])
@pytest.mark.parametrize("name", ["split_blocks", "split_traced"])
def test_a_sample_on_which_the_model_fails_is_told_from_a_model_that_cannot_be_split(name, sample):
    with pytest.raises(dpp.UsageError, match="Net fails on") as caught:
        MODEL_TAKERS[name](Net(), sample)
    assert caught.value.code == "model-fails-on-sample"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", [dpp.split, dpp.split_traced])
def test_a_name_that_repeats_is_refused(split):
    with refused("split-argument", dpp.UsageError, "'blocks.1' is named twice"):
        split(Net(), X, ["blocks.1", "blocks.1"])


@pytest.mark.parametrize(("stages", "parts"), [(np.int64(2), 2), (1, 1), (("blocks.1",), 2)])
def test_numpys_numbers_and_a_single_stage_are_served(stages, parts):
    assert len(dpp.split(Net(), X, stages).layers) == parts


@pytest.mark.parametrize("stages", [None, -1, 0, 9, True, 2.5, []])
def test_partition_refuses_what_is_no_number_of_stages(stages):
    with pytest.raises(dpp.UsageError, match="stages") as caught:
        dpp.partition(chain(), stages, sample=X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [Net, None, "a", {}, nn.ModuleList([nn.ReLU()])])
@pytest.mark.parametrize("cut", [lambda model: dpp.partition(model, 2, sample=X), lambda m: dpp.cut_after(m, ["0"])])
def test_what_is_no_list_of_layers_is_refused(cut, model):
    with refused("not-a-layer-list", dpp.UsageError, "list"):
        cut(model)


def test_a_list_of_layers_may_be_marked():
    marked = dpp.cut_after(list(chain()), ["0"])
    assert dpp.partition(marked, 2, "uniform").sizes == (1, 2)
