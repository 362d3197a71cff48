"""Refuses parameters and buffers that two stages would share: in two processes they would drift apart."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError


class _Bytes(NamedTuple):
    """Bytes first..last of a storage, and the stage and the name of the tensor that holds them."""

    first: int
    last: int
    stage: int
    name: str


def refuse_shared(module: nn.Sequential, boundaries: tuple[int, ...]) -> None:
    """Check that no parameter or buffer is used by layers of two different stages."""
    known: defaultdict[tuple[str, int], list[_Bytes]] = defaultdict(list)
    for index, (layer_name, layer) in enumerate(module.named_children()):
        stage = sum(boundary <= index for boundary in boundaries[1:])
        tensors = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            storage, first, last = _bytes_of(tensor)
            own = _Bytes(first, last, stage, f"{layer_name}.{name}")
            for other in known[storage]:
                if other.stage != stage and other.first <= last and first <= other.last:
                    raise _shared(other, own, "parameter" if isinstance(tensor, nn.Parameter) else "buffer")
            known[storage].append(own)


def _bytes_of(tensor: Tensor) -> tuple[tuple[str, int], int, int]:
    """Return the storage of a tensor, and the offsets of its first and last byte there.

    Views of one storage are shared if their bytes overlap. A tensor without memory of its own (meta, sparse, empty) is
    shared only if it is the same object.
    """
    has_memory = tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel() > 0
    if not has_memory:
        return ("object", id(tensor)), 0, 0
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return (str(tensor.device), tensor.untyped_storage().data_ptr()), first * size, (last + 1) * size - 1


def _shared(one: _Bytes, other: _Bytes, kind: str) -> UsageError:
    return UsageError(
        f"{one.name!r} (stage {one.stage}) and {other.name!r} (stage {other.stage}) are one shared {kind}, and stages "
        "exchange no gradients; put both layers in one stage (`cut` as a list), or give each its own (`dpp.untie`)",
        code="tensor-shared-by-stages",
        key="cut",
    )
