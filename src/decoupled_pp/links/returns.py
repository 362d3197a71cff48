"""Builds and reads messages that go back over a link between ranks: credits, a goodbye, and floats of a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.links.header import not_of_a_packet

# The first word of a message is its kind.
GOODBYE = 0
FLOATS = 2
CREDIT = 0x0101_0101_0101_0101

_WORD = 8
_HEADER = 3 * _WORD  # kind, number of the packet, number of floats


def backward_bytes(floats: int) -> int:
    """Return the size of the messages that go back, with room for so many floats (0: none are ever sent)."""
    return _WORD if floats == 0 else _HEADER + 4 * floats


def word(size: int, kind: int) -> Tensor:
    """Return a message of `size` bytes that is nothing but its kind."""
    message = torch.zeros(size, dtype=torch.uint8)
    message[:_WORD].view(torch.int64)[0] = kind
    return message


def floats_message(size: int, number: int, floats: Tensor) -> Tensor:
    """Return a message of `size` bytes with the floats of packet `number`; UsageError if there are too many."""
    end = _HEADER + 4 * floats.numel()
    if end > size:
        raise UsageError(
            f"packet {number} has {floats.numel()} samples, more than the plan's sample, which sets the size of what "
            "comes back (`critic_target`); give partition a sample as large as the largest micro-batch",
            code="packet-larger-than-sample",
        )
    message = word(size, FLOATS)
    message[_WORD:_HEADER].view(torch.int64).copy_(torch.tensor([number, floats.numel()]))
    message[_HEADER:end].view(torch.float32).copy_(floats.float())
    return message


def kind_of(message: Tensor) -> int:
    """Return the first word of a message."""
    return int(message[:_WORD].view(torch.int64).item())


def floats_in(message: Tensor) -> tuple[int, Tensor]:
    """Return the number of the packet and its floats, (B,), in the message's memory."""
    number, count = message[_WORD:_HEADER].view(torch.int64).tolist()
    if not 0 <= 4 * count <= message.numel() - _HEADER:
        raise not_of_a_packet(f"{count} floats in {message.numel()} bytes")
    return number, message[_HEADER : _HEADER + 4 * count].view(torch.float32)
