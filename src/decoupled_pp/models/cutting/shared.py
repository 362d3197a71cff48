"""Refuses what two stages would share and change, parameters and buffers: in two processes they would drift apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decoupled_pp.core.device import untouched
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.gradients import WithoutGradients
from decoupled_pp.core.packets import Payload, as_tuple
from decoupled_pp.models.cutting.layers import LAYER_FAULTS, copy_for


class _Bytes(NamedTuple):
    """Bytes first..last of a storage, and the stage and the name of the tensor that holds them."""

    first: int
    last: int
    stage: int
    name: str


def refuse_shared(module: nn.Sequential, boundaries: tuple[int, ...], hiddens: Sequence[Payload] | None = None) -> None:
    """Check that no parameter, and no buffer that is written, is used by layers of two different stages.

    A constant buffer (a rotary table) may be shared: every process has its own. `hiddens`, the inputs of all layers,
    are what the layers are tried on; without them no buffer counts as constant.
    """
    written: set[int] | None = None  # found when it is asked for
    known: defaultdict[tuple[str, int], list[_Bytes]] = defaultdict(list)
    for index, (layer_name, layer) in enumerate(module.named_children()):
        stage = sum(boundary <= index for boundary in boundaries[1:])
        tensors = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            storage, first, last = _bytes_of(tensor)
            own = _Bytes(first, last, stage, f"{layer_name}.{name}")
            for other in known[storage]:
                if other.stage == stage or other.first > last or first > other.last:
                    continue
                if isinstance(tensor, nn.Parameter) or hiddens is None:
                    raise _shared(other, own, "parameter" if isinstance(tensor, nn.Parameter) else "buffer")
                written = _written(module, hiddens) if written is None else written
                if id(tensor) in written:
                    raise _shared(other, own, "buffer that forward writes")
            known[storage].append(own)


def _written(module: nn.Sequential, hiddens: Sequence[Payload]) -> set[int]:
    """Return the ids of the buffers that a forward pass in training mode changes or replaces."""
    found: set[int] = set()
    with untouched(module, as_tuple(hiddens[0])[0].device):
        for (_, layer), given in zip(module.named_children(), hiddens, strict=True):
            before = {key: (buffer, buffer.clone()) for key, buffer in layer.named_buffers()}
            layer.train()
            with suppress(*LAYER_FAULTS):  # batch statistics of a sample of one, say
                WithoutGradients()(layer, copy_for(layer, given))
            now = dict(layer.named_buffers())
            found |= {id(old) for key, (old, content) in before.items() if not _is_same(now.get(key), old, content)}
    return found


def _is_same(now: Tensor | None, old: Tensor, content: Tensor) -> bool:
    if now is not old:
        return False
    return old.is_meta or old.layout is not torch.strided or torch.equal(old, content)


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
