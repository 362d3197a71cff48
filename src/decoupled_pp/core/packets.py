"""Defines what travels between stages: payloads of tensors, and the packets that carry them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.structures import CONSTANTS, cannot_travel, is_flat, is_plain, memory_of, remember_classes
from decoupled_pp.core.torch_private import is_container, pytree

Payload: TypeAlias = Any
"""The data between layers: one tensor, a flat tuple of tensors, or tensors in any nesting of containers.

Containers are tuples, lists, dictionaries, named tuples and the classes that torch's pytree knows; beside tensors they
hold None, truth values, numbers and strings. Of a payload there is always at least one tensor.
"""

Batch: TypeAlias = tuple[Payload, Payload]
"""(input, target) of one micro-batch; dimension 0 of the target's first tensor is the batch."""

Loss: TypeAlias = Callable[[Tensor, Payload], Tensor]
"""loss(logits, target) -> scalar, the mean over the micro-batch (or its sum, see `criterion.Criterion`)."""


class PacketKind(IntEnum):
    """Says what a stage is to do with a packet. All kinds travel the links in order, first in first out."""

    TRAIN = 0
    EVALUATE = 1
    EVALUATION_END = 2
    SAVE = 3
    END = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """One message of the pipeline: a micro-batch on its way forward, or a marker between micro-batches."""

    kind: PacketKind
    number: int  # sequence number of a TRAIN packet, from 0; for other kinds the count of TRAIN packets before it
    payload: Payload = ()  # activations
    target: Payload = ()  # targets of the micro-batch; they ride along to every stage
    rider: Payload = ()  # tensors that a critic sends to the next stage's critic (`Critic.rider`)
    weight: float = 1.0  # how much it counts among micro-batches (`Criterion.weight`); 0: nothing in it counts

    @property
    def samples(self) -> int:
        """Number of samples, by the target: networks may put the batch in any dimension of what travels."""
        return batch_size(self.target)


def batch_size(payload: Payload) -> int:
    """Return the size of dimension 0 of the first tensor: 1 if it has no dimension, 0 if there is no tensor."""
    tensors = as_tuple(payload)
    if not tensors:
        return 0
    return tensors[0].shape[0] if tensors[0].dim() else 1


def as_tuple(payload: Payload) -> tuple[Tensor, ...]:
    """Return the tensors of a payload, in order; a flat tuple is returned itself."""
    if isinstance(payload, Tensor):
        return (payload,)
    if is_flat(payload):
        return cast(tuple[Tensor, ...], payload)
    return tuple(leaf for leaf in pytree.tree_leaves(payload) if isinstance(leaf, Tensor))


def map_payload(function: Callable[[Tensor], Tensor], payload: Payload) -> Payload:
    """Apply `function` to every tensor and keep the structure around them."""
    if isinstance(payload, Tensor):
        return function(payload)
    if is_flat(payload):
        return tuple(map(function, payload))
    return pytree.tree_map_only(Tensor, function, payload)


def first_tensor(payload: Payload) -> Tensor:
    """Return the tensor a built-in critic looks at: the payload itself, or the first of its tensors."""
    return payload if isinstance(payload, Tensor) else as_tuple(payload)[0]


def takes_gradient(tensor: Tensor) -> bool:
    """Return whether a tensor can be a leaf that a gradient is taken for: floating or complex, and not sparse."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.layout is torch.strided


def as_payload(value: object, source: str, code: str = "output-cannot-travel") -> Payload:
    """Return what a user gives as a payload: a list becomes a tuple (a DataLoader makes lists), a mapping a dict."""
    if isinstance(value, list):
        value = tuple(value)
    elif isinstance(value, Mapping) and not is_container(value):
        value = dict(value)
    return check_payload(value, source, code)


def check_payload(value: object, source: str, code: str = "output-cannot-travel") -> Payload:
    """Return `value` if it is a payload, else raise UsageError; `source` begins its text, as "layer 'a' returned"."""
    if isinstance(value, Tensor) or (is_flat(value) and value != ()):
        return value
    leaves, _ = pytree.tree_flatten_with_path(value)
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor) and type(leaf) not in CONSTANTS:
            raise cannot_travel(source, leaf, pytree.keystr(path), code)
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise UsageError(f"{source} a {type(value).__name__} without a tensor; there must be at least one", code=code)
    remember_classes(value)
    return value


def payload_bytes(payload: Payload) -> int:
    """Return the bytes of all tensors of a payload; of a sparse one, those of its parts."""
    if is_plain(payload):
        return int(payload.nbytes)
    total = 0
    for tensor in as_tuple(payload):
        parts = (tensor,) if tensor.layout is torch.strided else memory_of(tensor).values()
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
