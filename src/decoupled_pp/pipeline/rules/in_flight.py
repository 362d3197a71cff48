"""Holds packets that a stage has sent on and whose gradients are still to come, and writes them into checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from decoupled_pp.core.packets import Packet, PacketKind, map_payload
from decoupled_pp.core.structures import as_bytes, form_of, memory_of, of_form
from decoupled_pp.pipeline.rules.stash import copies_of_buffers

Tensors: TypeAlias = tuple[Tensor, ...]


@dataclass
class InFlight:
    """A packet that a stage has sent on and is still to learn from.

    Attributes:
        packet: The stage's input; without target, which the last stage has.
        random: Position of the stage's random stream before the forward pass.
        like: Shapes and types of the tensors that come back, on the meta device.
        version: Optimizer steps that the stage had done.
        weights: The weights of the forward pass by name, if they are kept; packets of one version share them.
        buffers: The buffers before the forward pass by name, if they are kept.
        gradient: What has come back; None before.
    """

    packet: Packet
    random: Tensor
    like: Tensors = ()
    version: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: Tensors | None = None

    @property
    def number(self) -> int:
        """The packet's number."""
        return self.packet.number


def to_state(packets: Iterable[InFlight], trunk: nn.Module) -> dict[str, Any]:
    """Return the state of packets in flight by name; buffers that are in the layers as they were then are left out."""
    present = dict(trunk.named_buffers())
    state: dict[str, Any] = {}
    for one in packets:
        start = f"packet.{one.number}"
        state[f"{start}.weight"] = one.packet.weight
        state[f"{start}.version"] = one.version
        state[f"{start}.random"] = one.random
        state[f"{start}.like"] = json.dumps([[str(t.dtype).removeprefix("torch."), *t.shape] for t in one.like])
        state[f"{start}.input"], tensors = form_of(one.packet.payload)
        state |= {f"{start}.input.{i}": tensor for i, tensor in enumerate(tensors)}
        state[f"{start}.returned"] = one.gradient is not None
        state |= {f"{start}.gradient.{i}": tensor for i, tensor in enumerate(one.gradient or ())}
        moved = {name: copy for name, copy in one.buffers.items() if not _same(copy, present[name])}
        state |= {f"{start}.buffer.{name}": copy for name, copy in moved.items()}
        state |= {f"version.{one.version}.{name}": copy for name, copy in one.weights.items()}
    return state


def from_state(state: Mapping[str, Any], device: torch.device, trunk: nn.Module) -> Iterator[InFlight]:
    """Yield the packets of a state, oldest first, with their tensors on a device."""
    present = copies_of_buffers(trunk)
    weights: dict[int, dict[str, Tensor]] = {}
    for key, copy in state.items():
        if key.startswith("version."):
            _, version, name = key.split(".", 2)
            weights.setdefault(int(version), {})[name] = copy.to(device)
    for number in sorted({int(key.split(".")[1]) for key in state if key.startswith("packet.")}):
        start = f"packet.{number}"
        inputs = of_form(state[f"{start}.input"], _listed(state, f"{start}.input."))
        gradient = tuple(tensor.to(device) for tensor in _listed(state, f"{start}.gradient."))
        stashed = {
            key.removeprefix(f"{start}.buffer."): copy.to(device)
            for key, copy in state.items()
            if key.startswith(f"{start}.buffer.")
        }
        version = state[f"{start}.version"]
        own = weights.get(version, {})
        yield InFlight(
            packet=Packet(
                PacketKind.TRAIN,
                number,
                map_payload(lambda tensor: tensor.to(device), inputs),
                weight=state[f"{start}.weight"],
            ),
            random=state[f"{start}.random"],
            like=tuple(_meta(*written) for written in json.loads(state[f"{start}.like"])),
            version=version,
            weights=own,
            buffers={**present, **stashed} if own or stashed else {},
            gradient=gradient if state[f"{start}.returned"] else None,
        )


def _listed(state: Mapping[str, Any], start: str) -> list[Tensor]:
    count = sum(key.startswith(start) for key in state)
    return [state[f"{start}{i}"] for i in range(count)]


def _meta(dtype: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bits; a NaN is itself."""
    pairs = zip(memory_of(one).values(), memory_of(other).values(), strict=True)
    return all(a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs)
