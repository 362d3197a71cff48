"""Sorts the parameters of a stage into the groups of its optimizer, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.suggestions import did_you_mean
from decoupled_pp.settings.run import OptimizerSettings, ParameterGroup

_CRITIC = "critic."


def named_parameters(trunk: nn.Module, critic: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that `optimizer.groups` matches."""
    named = dict(trunk.named_parameters())
    if critic is not None:
        named |= {_CRITIC + name: parameter for name, parameter in critic.named_parameters()}
    return named


def parameter_groups(
    choice: OptimizerSettings, named: Mapping[str, nn.Parameter], modules: Sequence[nn.Module]
) -> list[dict[str, Any]]:
    """Return torch's groups: one of the parameters that no entry matches, and one for each entry.

    With `no_decay`, each of them is two: what decays, and what does not. Groups may be empty, so that a group keeps
    its place when layers are frozen or unfrozen.
    """
    undecayed = _undecayed(named.values(), modules) if choice.no_decay else None
    groups: list[dict[str, Any]] = []
    for number, arguments in enumerate([{}, *(entry.arguments for entry in choice.groups)]):
        chosen = [p for name, p in named.items() if _place(name, choice.groups) == number]
        if undecayed is None:
            groups.append({"params": chosen, **arguments})
            continue
        groups.append({"params": [p for p in chosen if id(p) not in undecayed], **arguments})
        # What an entry says of its own parameters goes before the general rule.
        groups.append({"params": [p for p in chosen if id(p) in undecayed], "weight_decay": 0.0, **arguments})
    return groups


def refuse_unmatched(choice: object, network: nn.Module) -> None:
    """Raise UsageError if an entry of `optimizer.groups` matches no parameter of the whole network."""
    if not isinstance(choice, OptimizerSettings):
        return
    names = [name for name, _ in network.named_parameters()]
    for number, entry in enumerate(choice.groups):
        for pattern in entry.patterns:
            # Names of critics are known only to the ranks that build them.
            if not pattern.startswith(_CRITIC) and not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"`optimizer.groups`: no parameter of the network matches {pattern!r}{did_you_mean(pattern, names)}"
                    f"; its names look like {', '.join(names[:3])}",
                    code="parameter-group-matches-nothing",
                    key=f"optimizer.groups.{number}.match",
                )


def _place(name: str, entries: Sequence[ParameterGroup]) -> int:
    """Return the number of the first entry that matches, from 1; 0 if none does."""
    for number, entry in enumerate(entries, start=1):
        if any(fnmatchcase(name, pattern) for pattern in entry.patterns):
            return number
    return 0


def _undecayed(parameters: Iterable[nn.Parameter], modules: Sequence[nn.Module]) -> set[int]:
    """Return the ids of the parameters that `no_decay` is for."""
    vectors = {id(parameter) for parameter in parameters if parameter.dim() <= 1}
    inside = [part for module in modules for part in module.modules()]
    return vectors | {id(part.weight) for part in inside if isinstance(part, nn.Embedding | nn.EmbeddingBag)}
