"""Turns token samples into masked-language-model ones (Devlin et al. 2019, 1810.04805, section 3.1, task 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_pp.core.criterion import IGNORED
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, first_tensor
from decoupled_pp.data.batches import Augmentation
from decoupled_pp.data.vocabulary import Vocabulary
from decoupled_pp.settings.sections import TokenSettings


def masking(settings: TokenSettings, vocabulary: Vocabulary) -> Augmentation | None:
    """Return the function that masks tokens of a batch; None if the settings ask for next tokens."""
    if settings.target != "masked_tokens":
        return None
    mask = vocabulary.mask
    if mask is None:
        raise UsageError(
            "`data.target` masked_tokens needs a tokenizer with a mask token; give `data.tokenizer` the one of a "
            "masked language model",
            code="no-mask-token",
            key="data.tokenizer",
        )

    def change(batch: Batch, generator: torch.Generator) -> Batch:
        return masked(first_tensor(batch[0]), mask, vocabulary.size, settings.mask_share, generator)

    return change


def masked(tokens: Tensor, mask: int, size: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose a share of the tokens to predict, at least one: 80 % of them become `mask`, 10 % any token, 10 % stay.

    Returns inputs (B, T), and targets (B, T): the tokens that were chosen, IGNORED elsewhere.
    """
    draws = torch.rand(tokens.shape, generator=generator)
    # Without a chosen token the loss would be a mean over nothing, NaN: the bound is at least just above the smallest.
    chosen = draws < max(share, float(draws.min()) * (1 + 1e-6))
    fate = torch.rand(tokens.shape, generator=generator)
    others = torch.randint(size, tokens.shape, generator=generator)
    # The 10 % that stay teach the model to represent tokens it can see; with masks alone it would not have to.
    inputs = torch.where(chosen & (fate < 0.8), mask, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), others, inputs)
    return inputs, torch.where(chosen, tokens, IGNORED)
