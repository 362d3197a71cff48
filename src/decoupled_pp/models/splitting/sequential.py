"""Flattens networks of nested `nn.Sequential`, and marks where they may be cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from decoupled_pp.core.arguments import expect
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.torch_private import child_modules, has_hooks
from decoupled_pp.models.cutting.layers import as_sequential, is_plain_sequential, missing_layer, refuse_hooks


def flatten(network: nn.Sequential) -> Layers:
    """Return the layers of nested `nn.Sequential`s in one list, under the names that they have in the network.

    Args:
        network: Its layers stay the same modules, so `state_dict()` has the same keys and tensors as before.

    Raises:
        UsageError: It is no `nn.Sequential`.
    """
    if not is_plain_sequential(network):
        raise UsageError(
            f"a {type(network).__name__} is no nn.Sequential, so its layers do not simply follow one another; "
            "pass them as a list, or split it at its blocks or by tracing",
            code="not-a-layer-list",
        )
    refuse_hooks(network)
    flat = Layers(_leaves(network, ""))
    if isinstance(network, Layers):
        flat.tied = network.tied
        flat.own_names = network.own_names
    flat.training = network.training  # not train(), which would wake layers that are in evaluation mode
    return flat


def cut_after(network: nn.Sequential | Sequence[nn.Module], names: Sequence[str]) -> Layers:
    """Mark the layers after which a network may be cut; `partition` then chooses among these places.

    With as many names as cuts, the cut is given: `partition(cut_after(model, ["layer2", "layer3.1"]), stages=3)`.

    Args:
        network: Nested `nn.Sequential`s, or a list of layers; they are flattened.
        names: Layers, or nested `nn.Sequential`s as a whole, by their dotted names, in order.

    Raises:
        UsageError: A name that is none of its layers, is the last one, or out of order.
    """
    expect("cut_after: names", names, (list, tuple), "a list of names of layers")
    if not isinstance(network, nn.Sequential):
        network = as_sequential(network)
    flat = network if isinstance(network, Layers) else flatten(network)
    keys = list(child_modules(flat))
    places: list[int] = []
    for name in names:
        inside = [index for index, key in enumerate(keys) if key == name or key.startswith(f"{name}.")]
        fault = None
        if not inside:
            fault = f"is no layer of the network; its layers are {', '.join(keys)}"
        elif inside[-1] + 1 == len(keys):
            fault = "is the end of the network; name layers before it"
        elif places and inside[-1] + 1 <= places[-1]:
            fault = "does not come after the layer named before it; name them in order"
        if fault is not None:
            raise UsageError(f"cut_after: {name!r} {fault}", code="bad-cut-point")
        places.append(inside[-1] + 1)
    flat.places = tuple(places)
    return flat


def _leaves(network: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in child_modules(network).items():
        if child is None:
            raise missing_layer(f"{prefix}{name}")
        if (
            is_plain_sequential(child) and len(child_modules(child)) and not has_hooks(child)
        ):  # they run around all of it
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
