"""Lets a stage's layers recompute their activations in the backward pass (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple, map_payload
from decoupled_pp.core.structures import write
from decoupled_pp.core.torch_private import version_of


def checkpointed(trunk: nn.Module) -> Callable[[Payload], Payload]:
    """Return the layers as one function; each recomputes its activations in the backward pass."""
    runs: dict[nn.Module, Callable[[Payload], Payload]] = {layer: _CopyIfInPlace(layer) for layer in trunk.children()}

    def run(payload: Payload) -> Payload:
        for layer, call in runs.items():
            # Reentrant checkpointing gives no gradients to a layer none of whose inputs needs one, and what a stage
            # receives never does.
            try:
                payload = checkpoint(call, payload, use_reentrant=False, **_same_buffers(layer))
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                raise UsageError(
                    f"`training.checkpoint_activations`: {type(layer).__name__} uses torch.func, and torch cannot "
                    "recompute such a layer; set `training.checkpoint_activations` to false",
                    code="layer-not-recomputable",
                    key="training.checkpoint_activations",
                ) from error
        return payload

    return run


class _CopyIfInPlace:
    """Runs a layer on a copy of its input if it works in place: it is given the same input once more."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._in_place: bool | None = None  # None: not known before the first call

    def __call__(self, payload: Payload) -> Payload:
        if self._in_place is False or torch.compiler.is_compiling():  # the compiler itself takes care of it
            return self._layer(payload)
        copied = map_payload(torch.clone, payload)
        before = [version_of(tensor) for tensor in as_tuple(copied)]
        result = self._layer(copied)
        self._in_place = before != [version_of(tensor) for tensor in as_tuple(copied)]
        return result


def _same_buffers(layer: nn.Module) -> dict[str, Any]:
    """Let recomputation start from the buffers that forward found (batch-norm statistics), and then put them back."""
    # Without this, torch's checkpoint counts every packet twice in running statistics (torch's compiler does not).
    buffers = list(layer.buffers())
    if torch.compiler.is_compiling() or not buffers:
        return {}
    found = [buffer.clone() for buffer in buffers]

    @contextmanager
    def as_found() -> Iterator[None]:
        left = [buffer.clone() for buffer in buffers]
        _fill(buffers, found)
        try:
            yield
        finally:
            _fill(buffers, left)

    return {"context_fn": lambda: (nullcontext(), as_found())}


def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        write(buffer.data, value)  # .data: no graph that saved the buffer is to see a change
