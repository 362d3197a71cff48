"""Lets a stage's layers recompute their activations in the backward pass (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoupled_pp.core.packets import Payload


def checkpointed(trunk: nn.Module) -> Callable[[Payload], Payload]:
    """Return the layers as one function; each recomputes its activations in the backward pass."""

    def run(payload: Payload) -> Payload:
        for layer in trunk.children():
            # Reentrant checkpointing gives no gradients to a layer none of whose inputs needs one, and what a stage
            # receives never does.
            payload = checkpoint(layer, payload, use_reentrant=False, **_same_buffers(layer))
        return payload

    return run


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
        buffer.data.copy_(value)  # .data: no graph that saved the buffer is to see a change
