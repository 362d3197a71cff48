"""Hooks that a model registers on its parts in its first call."""

import pytest
import torch
from torch import nn

import decoupled_pp as dpp

X = torch.randn(2, 4)


class Recording(nn.Module):
    """As models of `transformers` that return hidden states: hooks, once, with a note that they are there."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))

    def forward(self, x):
        if not getattr(self, "hooked", False):
            for block in self.blocks:
                block.register_forward_hook(lambda block, _, made: self.seen.append(made))
            self.hooked = True
        self.seen = []
        for block in self.blocks:
            x = block(x)
        assert len(self.seen) == len(self.blocks), "a hook for every block"
        return x


@pytest.mark.parametrize("split", [dpp.split_blocks, lambda model, x: dpp.split_traced(model, x, ["nope"])])
def test_the_model_runs_as_before_after_a_split_that_fails(split):
    """A model whose output is picked wrongly is run, and refused."""
    model = Recording()
    for _ in range(2):
        with pytest.raises(dpp.UsageError):
            split(model, X) if split is not dpp.split_blocks else split(model, X, output=lambda made: None)
    assert model(X).shape == X.shape
