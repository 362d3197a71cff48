"""Continues a token sequence with a plain language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import kept_modes
from decoupled_pp.core.errors import UsageError


@torch.no_grad()
def generate(  # noqa: PLR0917 - plain facts, each once
    module: nn.Module,  # (1, T) int64 token ids -> (1, T, V) logits; its modes are restored
    prompt_tokens: list[int],
    tokens: int,  # how many to generate
    context: int,  # the longest input the module takes: it sees the last `context` tokens
    temperature: float,  # divides the logits; 0 takes the likeliest token
    generator: torch.Generator,
    top_k: int | None = None,  # choose among this many likeliest tokens; None: among all
) -> list[int]:
    """Return a sampled continuation, one token at a time (no key-value cache: the module stays a plain one)."""
    if not prompt_tokens:
        raise UsageError(
            "the prompt has no tokens; give a `sample.prompt` (--prompt) of at least one token",
            code="empty-prompt",
            key="sample.prompt",
        )
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    sequence = list(prompt_tokens)
    with kept_modes(module):
        module.eval()
        for _ in range(tokens):
            window = torch.tensor([sequence[-context:]], device=device)
            output = module(window)
            logits = getattr(output, "logits", output)  # a model of `transformers` returns a record
            sequence.append(_choose(logits[0, -1], temperature, generator, top_k))
    return sequence[len(prompt_tokens) :]


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator, top_k: int | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        last = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < last, -torch.inf)
    # The generator lives on one device; the same seed must give the same text wherever the module runs.
    probabilities = torch.softmax(logits_V.float() / temperature, dim=-1).to(generator.device)
    return int(torch.multinomial(probabilities, 1, generator=generator))
