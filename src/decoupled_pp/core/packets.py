"""Defines what travels between stages: payloads of tensors, and the packets that carry them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from torch import Tensor

from decoupled_pp.core.errors import UsageError

Payload: TypeAlias = Tensor | tuple[Tensor, ...]
"""The data between layers: one tensor, or a flat tuple of tensors (of any dtypes and shapes)."""

Batch: TypeAlias = tuple[Payload, Payload]
"""(input, target) of one micro-batch; dimension 0 of every tensor is the batch."""

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
    payload: Payload = ()  # activations; dimension 0 is the batch
    target: Payload = ()  # targets of the micro-batch; they ride along to every stage
    rider: Payload = ()  # tensors that a critic sends to the next stage's critic (`Critic.rider`)
    weight: float = 1.0  # how much it counts among micro-batches (`Criterion.weight`); 0: nothing in it counts

    @property
    def samples(self) -> int:
        """Size of dimension 0 of the first payload tensor, 0 in a marker."""
        tensors = as_tuple(self.payload)
        return tensors[0].shape[0] if tensors and tensors[0].dim() else 0


def as_tuple(payload: Payload) -> tuple[Tensor, ...]:
    """Return the tensors of a payload, always as a tuple."""
    return (payload,) if isinstance(payload, Tensor) else payload


def map_payload(function: Callable[[Tensor], Tensor], payload: Payload) -> Payload:
    """Apply `function` to every tensor and keep the form (tensor or tuple)."""
    if isinstance(payload, Tensor):
        return function(payload)
    return tuple(function(tensor) for tensor in payload)


def first_tensor(payload: Payload) -> Tensor:
    """Return the tensor a built-in critic looks at: the payload itself, or the first of its tuple."""
    return payload if isinstance(payload, Tensor) else payload[0]


def check_payload(value: object, source: str) -> Payload:
    """Return `value` if it can travel a link, else raise UsageError naming `source` (the layer that made it)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) and value and all(isinstance(item, Tensor) for item in value):
        return value
    raise UsageError(
        f"{source} returned {type(value).__name__}: between layers only a tensor or a flat, non-empty tuple of "
        "tensors can travel; return one of these",
        code="output-cannot-travel",
    )


def payload_bytes(payload: Payload) -> int:
    """Return the bytes of all tensors of a payload."""
    return sum(tensor.numel() * tensor.element_size() for tensor in as_tuple(payload))
