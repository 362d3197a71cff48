"""Carries nested tensors between layers as a padded tensor and the lengths of its rows.

`nn.TransformerEncoder` makes its hidden state one in evaluation, if it is given a padding mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.core.torch_private import nested_from_lengths


def padded(hidden: Tensor, sizes: Sequence[torch.Size], *, slots: bool) -> list[Tensor]:
    """Return a hidden state as it travels: with `slots`, its rows' lengths behind it (none, if it is no nested tensor).

    `sizes` are those that it may have had before its padding was taken out.
    """
    if not slots:
        if hidden.is_nested:
            raise UsageError(
                "the blocks are given a nested tensor, and were not when the model was split; split it with a sample "
                "that has padding, as the data have",
                code="block-call-changed",
            )
        return [hidden]
    if not hidden.is_nested:
        return [hidden, torch.empty(0, dtype=torch.int64, device=hidden.device)]
    rows = hidden.unbind()
    (size,) = {size for size in sizes if len(size) == 3 and size[0] == len(rows) and size[2] == rows[0].shape[1]}
    lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
    return [hidden.to_padded_tensor(0.0, size), lengths]


def ragged(payload: Payload, *, slots: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the hidden state as the model's code knows it, and the tensors behind it in the payload."""
    hidden, *rest = as_tuple(payload)
    if not slots:
        return hidden, tuple(rest)
    lengths, *rest = rest
    return nested_from_lengths(hidden, lengths) if lengths.numel() else hidden, tuple(rest)
