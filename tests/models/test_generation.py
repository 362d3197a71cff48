"""Generation: context, temperature, generator, flags."""

import torch
from torch import nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.models import build_model, generate
from decoupled_pp.settings.sections import GptModel
from kit import refused


class Successor(nn.Module):
    """The likeliest next token is the last one plus 1 (mod V); remembers the longest input."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.longest = vocabulary, 0
        self.inner = nn.Dropout(0.5)

    def forward(self, tokens):
        assert not self.inner.training
        self.longest = max(self.longest, tokens.shape[1])
        return nn.functional.one_hot((tokens + 1) % self.vocabulary, self.vocabulary).float() * 3


def test_greedy_and_context():
    module = Successor(5)
    assert generate(module, [0, 1, 2], 6, 4, 0.0, torch.Generator()) == [3, 4, 0, 1, 2, 3]
    assert module.longest == 4


def test_sampling_depends_on_the_generator_alone():
    torch.manual_seed(0)
    network = build_model(
        GptModel(kind="gpt", width=16, depth=1, heads=2, dropout=0.5), DataInfo("tokens", (8,), 50)
    ).train()
    state = torch.get_rng_state()
    first = generate(network, [1], 20, 8, 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert first == generate(network, [1], 20, 8, 1.0, torch.Generator().manual_seed(1))
    assert first != generate(network, [1], 20, 8, 1.0, torch.Generator().manual_seed(2))
    assert all(0 <= token < 50 for token in first)


def test_flags_are_restored_each():
    module = Successor(5).train()
    module.inner.extra = nn.Linear(1, 1).eval()
    generate(module, [0], 1, 4, 1.0, torch.Generator())
    assert module.training
    assert module.inner.training
    assert not module.inner.extra.training


def test_empty_prompt():
    with refused("empty-prompt"):
        generate(Successor(5), [], 1, 4, 1.0, torch.Generator())
