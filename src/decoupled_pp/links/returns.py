"""What goes back over a link between ranks: credits, one goodbye, and the losses that a cascade asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError

GOODBYE, LOSSES, CREDIT = 0, 2, 0x0101_0101_0101_0101
"""First word of a message."""

_WORD = 8
_HEADER = 3 * _WORD


def backward_bytes(losses: int) -> int:
    """Size of the messages that go back, with room for so many losses (0: none are ever sent)."""
    return _WORD if losses == 0 else _HEADER + 4 * losses


def word(size: int, value: int) -> Tensor:
    """A message of so many bytes that begins with a word."""
    message = torch.zeros(size, dtype=torch.uint8)
    message[:_WORD].view(torch.int64)[0] = value
    return message


def losses_message(size: int, number: int, losses: Tensor) -> Tensor:
    """Kind, number of the packet, number of losses, the losses.

    Raises:
        UsageError: There are more than the messages have room for.
    """
    if _HEADER + 4 * losses.numel() > size:
        raise UsageError(
            f"packet {number} has {losses.numel()} samples, more than the plan's sample, which sets the size of what "
            "goes back (critic_target); give partition a sample as large as the largest micro-batch"
        )
    message = torch.zeros(size, dtype=torch.uint8)
    message[:_HEADER].view(torch.int64).copy_(torch.tensor([LOSSES, number, losses.numel()]))
    message[_HEADER : _HEADER + 4 * losses.numel()].view(torch.float32).copy_(losses.float())
    return message


def kind_of(message: Tensor) -> int:
    """The first word of a message."""
    return int(message[:_WORD].view(torch.int64).item())


def losses_in(message: Tensor) -> tuple[int, Tensor]:
    """Number of the packet, and its losses, (B,), in the message's memory."""
    number, count = message[_WORD:_HEADER].view(torch.int64).tolist()
    return number, message[_HEADER : _HEADER + 4 * count].view(torch.float32)
