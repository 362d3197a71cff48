"""Unties what several layers share: each later user gets its own, because stages exchange no gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from decoupled_pp.core.arguments import expect
from decoupled_pp.core.plans import Layers
from decoupled_pp.core.torch_private import child_modules, own_buffers, own_parameters


def untie(network: nn.Sequential | Sequence[nn.Module]) -> Layers:
    """Give every layer parameters, buffers and modules of its own.

    Where two layers use one parameter (such as a token embedding and an output projection), the later one gets a copy.
    They then train apart; `Trainer(refresh_tied=True)` keeps the earlier one in step.

    Args:
        network: Layers; they stay the same modules. An `nn.Sequential` keeps its layers' names.

    Returns:
        The layers; `tied` says which parameters were one.
    """
    expect("untie: the network", network, (nn.Sequential, list, tuple), "an nn.Sequential or a list of layers")
    named = network.named_children() if isinstance(network, nn.Sequential) else enumerate(network)
    layers = Layers((str(name), layer) for name, layer in named)
    for name, layer in child_modules(layers).items():
        expect(f"untie: layer {name!r}", layer, nn.Module, "an nn.Module")
    if isinstance(network, Layers):
        layers.places = network.places
        layers.own_names = network.own_names
    _give_own_parts(list(layers.children()))
    layers.tied = give_copies([{name: layer} for name, layer in layers.named_children()])
    return layers


def _give_own_parts(layers: Sequence[nn.Module]) -> None:
    """Give every later layer its own of the modules and buffers that it shares with an earlier one.

    Parameters stay what they are: `give_copies` unties them.
    """
    seen: set[int] = set()
    for layer in layers:
        copies: dict[int, Any] = {id(parameter): parameter for parameter in layer.parameters()}  # deepcopy's memo
        _replace_shared(layer, seen, copies)
        seen |= {id(held) for held in (*layer.modules(), *layer.buffers())}


def _replace_shared(module: nn.Module, seen: set[int], copies: dict[int, Any]) -> None:
    for name, buffer in own_buffers(module).items():
        if id(buffer) in seen and buffer is not None:
            own_buffers(module)[name] = copy.deepcopy(buffer, copies)
    for name, child in child_modules(module).items():
        if child is None:
            continue
        if id(child) in seen:
            child_modules(module)[name] = copy.deepcopy(child, copies)
        else:
            _replace_shared(child, seen, copies)


def give_copies(groups: Sequence[Mapping[str, nn.Module]], names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give every later group of modules its own copy of the parameters that it shares with an earlier one.

    With the model's own names of parameters, one that groups share under one name stays one: it is a layer used twice.
    Returns name of the copy -> name of the parameter in the first group that has it.
    """
    # Parameters are told apart by identity: equal values do not make two parameters one.
    seen: dict[int, str] = {}
    copies: dict[str, str] = {}
    for group in groups:
        new: dict[int, str] = {}
        own: dict[int, nn.Parameter] = {}
        for name, module, key, parameter in parameter_places(group):
            identity = id(parameter)
            if identity not in seen:
                new.setdefault(identity, name)
                continue
            if names is not None and names.get(name) == names.get(seen[identity]):
                continue
            if identity not in own:
                own[identity] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            own_parameters(module)[key] = own[identity]
            copies[name] = seen[identity]
        seen |= new  # only now: within a group parameters may be shared
    return copies


@contextmanager
def tied_again_if_it_fails(model: nn.Module) -> Iterator[None]:
    """Give a model back the parameters that it has now, if the body raises after `give_copies`."""
    places = list(parameter_places({"": model}))
    try:
        yield
    except Exception:
        for _, module, key, parameter in places:
            own_parameters(module)[key] = parameter
        raise


def parameter_places(group: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (name, module, key, parameter), also of parameters that occur again (`named_parameters` skips those)."""
    for prefix, part in group.items():
        for module_name, module in part.named_modules(prefix=prefix):
            for key, parameter in list(own_parameters(module).items()):
                if parameter is not None:
                    yield f"{module_name}.{key}", module, key, parameter
