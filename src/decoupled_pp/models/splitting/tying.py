"""Parameters that several layers share: each later user gets its own, because stages exchange no gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from decoupled_pp.core.plans import Layers


def untie(network: nn.Sequential | Sequence[nn.Module]) -> Layers:
    """Give every layer parameters of its own.

    Where two layers use one parameter, a token embedding and an output projection, say, the later one gets a copy. They
    then train apart; `Trainer(refresh_tied=True)` keeps the earlier one in step.

    Args:
        network: Layers; they stay the same modules. An `nn.Sequential` keeps its layers' names.

    Returns:
        The layers; `tied` says which parameters were one.
    """
    named = network.named_children() if isinstance(network, nn.Sequential) else enumerate(network)
    layers = Layers((str(name), layer) for name, layer in named)
    layers.places = network.places if isinstance(network, Layers) else None
    layers.tied = give_copies([{name: layer} for name, layer in layers.named_children()])
    return layers


def give_copies(groups: Sequence[Mapping[str, nn.Module]]) -> dict[str, str]:
    """Give every later group its own copy of the parameters that it shares with an earlier one.

    Args:
        groups: Modules by name; within a group they may go on sharing.

    Returns:
        Name of the copy -> name of the first.
    """
    seen: dict[int, str] = {}
    copies: dict[str, str] = {}
    for group in groups:
        met: dict[int, str] = {}
        own: dict[int, nn.Parameter] = {}
        for prefix, part in group.items():
            for name, module in part.named_modules(prefix=prefix):
                for key, parameter in list(module._parameters.items()):
                    if parameter is None:
                        continue
                    first = seen.get(id(parameter))
                    if first is not None:
                        if id(parameter) not in own:
                            copy = parameter.detach().clone()
                            own[id(parameter)] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
                        module._parameters[key] = own[id(parameter)]
                        copies[f"{name}.{key}"] = first
                    else:
                        met.setdefault(id(parameter), f"{name}.{key}")
        seen |= met
    return copies
