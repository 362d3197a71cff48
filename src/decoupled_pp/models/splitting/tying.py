"""Unties parameters that several layers share: each later user gets its own, because stages exchange no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from decoupled_pp.core.plans import Layers
from decoupled_pp.core.torch_private import own_parameters


def untie(network: nn.Sequential | Sequence[nn.Module]) -> Layers:
    """Give every layer parameters of its own.

    Where two layers use one parameter (such as a token embedding and an output projection), the later one gets a copy.
    They then train apart; `Trainer(refresh_tied=True)` keeps the earlier one in step.

    Args:
        network: Layers; they stay the same modules. An `nn.Sequential` keeps its layers' names.

    Returns:
        The layers; `tied` says which parameters were one.
    """
    named = network.named_children() if isinstance(network, nn.Sequential) else enumerate(network)
    layers = Layers((str(name), layer) for name, layer in named)
    if isinstance(network, Layers):
        layers.places = network.places
        layers.own_names = network.own_names
    layers.tied = give_copies([{name: layer} for name, layer in layers.named_children()])
    return layers


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
