"""Takes true gradients across a cut, for the rules under which they come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Payload, as_tuple, takes_gradient


def differentiable(payload: Payload) -> list[Tensor]:
    """Return the tensors of a payload that can have a gradient."""
    return [tensor for tensor in as_tuple(payload) if takes_gradient(tensor)]


def with_graph(hidden: Payload, gradient: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a stage that `backward` can start from, and the gradients for them."""
    # A tensor that does not depend on a parameter has no graph, and `backward` refuses it.
    pairs = [(t, g) for t, g in zip(differentiable(hidden), gradient, strict=True) if t.requires_grad]
    return [t for t, _ in pairs], [g for _, g in pairs]


def gradient_of(tensor: Tensor) -> Tensor:
    """Return the gradient of a leaf; zeros if the stage's output does not depend on it."""
    # Never nothing: the stage before waits for a tensor for each of its activations.
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)


def refuse_sparse(hidden: Payload, stage: int, key: str) -> None:
    """Raise UsageError if a stage's output has a sparse tensor for which a gradient would have to come back."""
    if any(tensor.requires_grad and not takes_gradient(tensor) for tensor in as_tuple(hidden)):
        raise UsageError(
            f"`{key}`: stage {stage} returns a sparse tensor that depends on its weights, and a gradient for one "
            "cannot come back; return it dense, or `cut` elsewhere",
            code="sparse-without-gradient",
            key=key,
        )
