"""Copies layers for critics: the same architecture with new weights, or with the same ones.

A layer that knows how to initialise itself says so with a method `reset_parameters()`, as torch's own layers do. On the
layer itself or on any module inside it, this method wins over looking further inside.
"""

from __future__ import annotations

import torch
from torch import nn

from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import on_meta
from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.critics.norms import plain_weights


def fresh_copy(layer: nn.Module, name: str) -> nn.Module:
    """Return a deep copy of `layer` with new weights; `layer` stays as it is. See `make_fresh`."""
    copied = copy_of(layer)
    if on_meta(copied):
        copied = copied.to_empty(device="cpu")
    return make_fresh(copied, name)


def make_fresh(layer: nn.Module, name: str) -> nn.Module:
    """Re-initialise `layer`, a copy, from torch's global generator; nothing in it is frozen or works in place after.

    Returns the same module, in training mode; `name` is its name in an error.
    """
    layer.train()
    try:
        with torch.no_grad(), plain_weights(layer) as computed:
            for part in (layer, *computed):
                _reset(part, "", name)
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"layer {name} ({type(layer).__name__}) computes its weights in a way that a critic cannot make afresh: "
            f"{first_line(error)}; choose `critic.kind` head",
            code="layer-not-copyable",
            key="critic.kind",
        ) from error
    return _made_trainable(layer)


def trainable_copy(layer: nn.Module) -> nn.Module:
    """Return a deep copy of `layer` with the same weights, none of them frozen; `layer` stays as it is."""
    if on_meta(layer):
        raise UsageError(
            "a critic is to copy weights of a later stage, which are not here while the network is on the meta device; "
            "choose `critic.weights` fresh, or `critic.kind` head, and leave `critic_overlap` out",
            code="weights-on-meta",
            key="model.meta",
        )
    return _made_trainable(copy_of(layer))


def _reset(module: nn.Module, name: str, root: str) -> None:
    """Re-initialise `module` (called `name` inside the layer `root`) and all it contains."""
    where = f"{root}{'.' if name else ''}{name} ({type(module).__name__})"
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for child_name, child in module.named_children():
        _reset(child, f"{name}.{child_name}" if name else child_name, root)
    own_reset = getattr(module, "_reset_parameters", None)  # the name in nn.MultiheadAttention and nn.Transformer
    if callable(own_reset):
        own_reset()
        return
    parameter = next((key for key, _ in module.named_parameters(recurse=False)), None)
    if parameter is not None:
        raise UsageError(
            f"layer {where} has a parameter {parameter!r} but no reset_parameters(), so a critic cannot make a fresh "
            "copy of it; add the method to the layer, or choose `critic.kind` head",
            code="layer-not-copyable",
            key="critic.kind",
        )


def _made_trainable(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # the stage's output is on its way to the next stage
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return layer.train()
