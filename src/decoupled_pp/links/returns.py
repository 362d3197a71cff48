"""Builds and reads messages that go back over a link between ranks: credits, a goodbye, and floats of a rule."""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_pp.links.header import not_of_a_packet

# The first word of a message is its kind.
GOODBYE = 0
FLOATS = 2
MORE_FLOATS = 3  # the rest is in the messages that follow
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


def floats_messages(size: int, number: int, floats: Tensor) -> list[Tensor]:
    """Return messages of `size` bytes with the floats of packet `number`, (B,), as many to each as it has room for."""
    parts = floats.float().split((size - _HEADER) // 4)
    return [_floats_message(size, number, part, last=part is parts[-1]) for part in parts]


def _floats_message(size: int, number: int, floats: Tensor, *, last: bool) -> Tensor:
    message = word(size, FLOATS if last else MORE_FLOATS)
    message[_WORD:_HEADER].view(torch.int64).copy_(torch.tensor([number, floats.numel()]))
    message[_HEADER : _HEADER + 4 * floats.numel()].view(torch.float32).copy_(floats)
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
