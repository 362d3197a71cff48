"""Refuses parameters and buffers that two stages would share: in two processes they would drift apart."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError


class _Owned(NamedTuple):
    """The bytes first..last of a storage, and whose they are."""

    first: int
    last: int
    stage: int
    name: str


def _bytes_of(tensor: Tensor) -> tuple[tuple[str, int], int, int]:
    """A tensor's storage, and its first and last byte there; two that share memory overlap (views, or one object)."""
    has_memory = tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel() > 0
    if not has_memory:
        return ("object", id(tensor)), 0, 0
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return (str(tensor.device), tensor.untyped_storage().data_ptr()), first * size, (last + 1) * size - 1


def refuse_shared(module: nn.Sequential, boundaries: tuple[int, ...]) -> None:
    """Check that no parameter or buffer is used by layers of two different stages.

    Args:
        module: The network.
        boundaries: Index of the first layer of every stage, then the number of layers.

    Raises:
        UsageError: One is, or two overlap in memory; names both places and the remedy.
    """
    owned: defaultdict[tuple[str, int], list[_Owned]] = defaultdict(list)
    for index, (layer_name, layer) in enumerate(module.named_children()):
        stage = sum(boundary <= index for boundary in boundaries[1:])
        tensors = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            storage, first, last = _bytes_of(tensor)
            mine = _Owned(first, last, stage, f"{layer_name}.{name}")
            for other in owned[storage]:
                if other.stage != stage and other.first <= last and first <= other.last:
                    raise _shared(other, mine, "parameter" if isinstance(tensor, nn.Parameter) else "buffer")
            owned[storage].append(mine)


def _shared(one: _Owned, other: _Owned, what: str) -> UsageError:
    return UsageError(
        f"{one.name!r} (stage {one.stage}) and {other.name!r} (stage {other.stage}) are one shared {what}, "
        "and stages exchange no gradients; put both layers in one stage (cut as a list), or give each "
        "its own (`dpp.untie`)"
    )
