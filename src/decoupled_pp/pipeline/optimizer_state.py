"""Reads and restores what an optimizer carries from step to step: state per parameter, entries of `param_groups`.

State per parameter is all that torch's own optimizers keep. Others (schedule-free ones, Prodigy) count and adapt in
their `param_groups`, beside the settings. An entry is state if steps have changed it: settings that have stayed what
they were are left to the run that resumes, which may change them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decoupled_pp.core.device import seeded
from decoupled_pp.core.errors import UsageError

Groups: TypeAlias = dict[str, dict[str, Any]]  # `<optimizer>.<group>` -> its entries without the parameters


def group_entries(optimizers: Sequence[Optimizer]) -> Groups:
    """Return a copy of all entries of the groups."""
    return {key: _entries(group) for key, group in _groups(optimizers)}


def refuse_unsavable(groups: Groups) -> None:
    """Raise UsageError if a group has an entry that could not be saved if it changed."""
    for group in groups.values():
        for name, value in group.items():
            if not _savable(value):
                raise _cannot_be_saved("the optimizer", value, f"{name!r} in its param_groups")


def changed_entries(optimizers: Sequence[Optimizer], before: Groups, scheduled: bool) -> dict[str, Any]:
    """Return the entries that steps have changed since `before`, by `<optimizer>.<group>.<name>`."""
    ignored = {"params", "initial_lr"}
    if scheduled:  # a rate that a schedule sets is no state of the optimizer
        ignored.add("lr")
    changed = {}
    for key, group in _groups(optimizers):
        for name, value in group.items():
            is_as_before = name in before[key] and _equal(value, before[key][name])
            if name not in ignored and not is_as_before:
                changed[f"{key}.{name}"] = value
    return changed


def reset_entries(optimizers: Sequence[Optimizer], groups: Groups, saved: Mapping[str, Any]) -> None:
    """Give the groups these entries, with the saved changes."""
    present = dict(_groups(optimizers))
    for key, group in present.items():
        parameters = group["params"]
        group.clear()  # an entry that steps have added must not outlive the reset
        group.update(params=parameters, **_entries(groups[key]))
    for key, value in saved.items():
        i, j, name = key.split(".", 2)  # as `changed_entries` makes them
        group = present[f"{i}.{j}"]
        group[name] = _like(group.get(name), value)


def carry_over(old: Sequence[Optimizer], new: Sequence[Optimizer]) -> None:
    """Let new optimizers go on from the state of old ones of their kind; that of groups if there are as many."""
    for one in new:
        for other in (optimizer for optimizer in old if type(optimizer) is type(one)):
            held = {parameter for group in one.param_groups for parameter in group["params"]}
            one.state.update({parameter: state for parameter, state in other.state.items() if parameter in held})
            if len(one.param_groups) == len(other.param_groups):
                for group, before in zip(one.param_groups, other.param_groups, strict=True):
                    group.update({name: value for name, value in before.items() if name != "params"})


def make_state(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Let the optimizers make the state they keep of these parameters, by a step with gradients of zero."""
    # Only the optimizer knows which state it keeps, in which shapes, types and places. The step may change parameters
    # and entries of the groups all the same (weight decay, a counter): the caller restores these afterwards.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with seeded(0, device):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def named_state(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (parameter's name, field, value) of all state of the named parameters; UsageError if one is unsavable."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if parameter not in names:
                continue
            for field, value in state.items():
                if isinstance(value, Tensor | int | float):
                    yield names[parameter], field, value
                elif value is not None:
                    raise _cannot_be_saved(type(optimizer).__name__, value, repr(field))


def owners(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> dict[str, Optimizer]:
    """Return the optimizer that trains each parameter, by the parameter's name."""
    found: dict[str, Optimizer] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found |= {names[parameter]: optimizer for parameter in group["params"] if parameter in names}
    return found


def _cannot_be_saved(keeper: str, value: object, where: str) -> UsageError:
    return UsageError(
        f"`optimizer`: {keeper} keeps a {type(value).__name__} ({where}), which a checkpoint cannot hold; keep "
        "numbers, strings or tensors there, or train without checkpoints",
        code="optimizer-state-not-savable",
        key="optimizer",
    )


def _like(first: object, value: Any) -> Any:
    """Return the saved value in the form and on the device of the entry that it replaces."""
    if isinstance(first, Tensor) and isinstance(value, Tensor):
        return value.to(first.device)
    # JSON has no tuples, and an optimizer may compare or unpack its own (betas).
    return tuple(value) if isinstance(first, tuple) else value


def _groups(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            yield f"{i}.{j}", group


def _entries(group: dict[str, Any]) -> dict[str, Any]:
    # Deep, because some optimizers change a list or tensor of their group in place.
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _savable(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_savable(item) and not isinstance(item, Tensor) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b
