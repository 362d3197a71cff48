"""Lets a stage's layers recompute their activations in the backward pass (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoupled_pp.core.device import kept_gradients
from decoupled_pp.core.packets import Payload, as_tuple, map_payload
from decoupled_pp.core.structures import write
from decoupled_pp.core.torch_private import hooks_aside, version_of


def checkpointed(trunk: nn.Module) -> Callable[[Payload], Payload]:
    """Return the layers as one function; each recomputes its activations in the backward pass."""
    runs: dict[nn.Module, Callable[[Payload], Payload]] = {layer: _CopyIfInPlace(layer) for layer in trunk.children()}

    def run(payload: Payload) -> Payload:
        for layer, call in runs.items():
            # Reentrant checkpointing gives no gradients to a layer none of whose inputs needs one, and what a stage
            # receives never does.
            payload = checkpoint(
                call, payload, use_reentrant=False, early_stop=not _fills_late(layer), **_as_forward_found(layer)
            )
        return payload

    return run


def _fills_late(layer: nn.Module) -> bool:
    """Return whether recomputing must not stop at the last tensor that is saved: RReLU draws into it afterwards."""
    return any(isinstance(part, nn.RReLU) for part in layer.modules())


class _CopyIfInPlace:
    """Runs a layer on a copy of its input if it works in place: it is given the same input once more."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._in_place: bool | None = None  # None: not known before the first call

    def __call__(self, payload: Payload) -> Payload:
        if self._in_place is False or torch.compiler.is_compiling():  # the compiler itself takes care of it
            return self._run(payload)
        copied = map_payload(torch.clone, payload)
        before = [version_of(tensor) for tensor in as_tuple(copied)]
        result = self._run(copied)
        self._in_place = before != [version_of(tensor) for tensor in as_tuple(copied)]
        return result

    def _run(self, payload: Payload) -> Payload:
        """Run the layer; what torch.func saves inside of it is kept, since torch can recompute no such part."""
        if torch.compiler.is_compiling():
            return self._layer(payload)
        with hooks_aside():
            return self._layer(payload)


def _as_forward_found(layer: nn.Module) -> dict[str, Any]:
    """Let recomputation start from the buffers that forward found, and leave buffers and gradients as they were."""
    # Without this, torch's checkpoint counts every packet twice in running statistics (torch's compiler does not), and
    # twice in the gradients that a layer makes by `backward` inside its own forward.
    if torch.compiler.is_compiling():
        return {}
    buffers = list(layer.buffers())
    found = [buffer.clone() for buffer in buffers]

    @contextmanager
    def as_found() -> Iterator[None]:
        left = [buffer.clone() for buffer in buffers]
        _fill(buffers, found)
        try:
            with kept_gradients(layer):
                yield
        finally:
            _fill(buffers, left)

    return {"context_fn": lambda: (nullcontext(), _EveryTime(as_found))}


class _EveryTime:
    """A context that may be entered again: a layer that differentiates inside is recomputed there, and later again."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        write(buffer.data, value)  # .data: no graph that saved the buffer is to see a change
