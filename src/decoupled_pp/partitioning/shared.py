"""Refuses parameters and buffers that two stages would share: in two processes they would drift apart."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

from decoupled_pp.contracts import UsageError


def _identity(tensor: Tensor) -> tuple[str, int]:
    """Equal for two tensors that are one object or begin at one address (a view counts as sharing)."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return "object", id(tensor)
    return str(tensor.device), tensor.data_ptr()


def refuse_shared(module: nn.Sequential, boundaries: tuple[int, ...]) -> None:
    """Check that no parameter or buffer is used by layers of two different stages.

    Args:
        module: The network.
        boundaries: Index of the first layer of every stage, then the number of layers.

    Raises:
        UsageError: One is; names both places and the remedy.
    """
    owner: dict[tuple[str, int], tuple[int, str]] = {}
    for index, (layer_name, layer) in enumerate(module.named_children()):
        stage = sum(boundary <= index for boundary in boundaries[1:])
        tensors = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            full_name = f"{layer_name}.{name}"
            first_stage, first_name = owner.setdefault(_identity(tensor), (stage, full_name))
            if first_stage != stage:
                what = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                raise UsageError(
                    f"{first_name!r} (stage {first_stage}) and {full_name!r} (stage {stage}) are one shared {what}, "
                    "and stages exchange no gradients; put both layers in one stage (cut as a list), or untie them by "
                    f"cloning: replace {full_name!r} with a clone of its own"
                )
