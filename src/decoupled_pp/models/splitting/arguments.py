"""Refuses arguments of the splitting functions that are of another kind, before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn

from decoupled_pp.core.errors import UsageError


def check_model(model: object) -> None:
    """Raise UsageError unless the model is a module."""
    if isinstance(model, type):
        raise _refusal("model", f"it is the class {model.__name__}; give an object of it, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise _refusal("model", f"it is of type {type(model).__name__}; give an nn.Module")


def check_model_or_list(model: object) -> None:
    """Raise UsageError unless the model is a module or a list of at least one."""
    if not isinstance(model, list | tuple):
        check_model(model)
    elif not model:
        raise _refusal("model", "it is an empty list; give a list of modules")
    else:
        for layer in model:
            check_model(layer)


def check_names(argument: str, names: object) -> None:
    """Raise UsageError unless these are names of modules in an order."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _refusal(argument, f"it is {names!r:.60}; give a list of names of modules, as named_modules() has them")


def checked_stages(stages: Any) -> int | list[str] | tuple[str, ...]:
    """Return the number of stages as an int, or the names of modules to cut after."""
    if isinstance(stages, Integral) and not isinstance(stages, bool):
        if stages < 1:
            raise _refusal("stages", f"it is {stages}; give 1 or more")
        return int(stages)
    if not isinstance(stages, list | tuple) or not all(isinstance(name, str) for name in stages) or not stages:
        raise _refusal("stages", f"it is {stages!r:.60}; give a number, or a list of names of modules to cut after")
    return stages


def check_calls(output: object, options: object) -> None:
    """Raise UsageError unless `output` can be called and `options` are by name; either may be None."""
    if output is not None and not callable(output):
        raise _refusal("output", f"it is {output!r:.60}; give a function of the model's result")
    if options is not None and not isinstance(options, Mapping):
        raise _refusal("options", f"it is {options!r:.60}; give a dictionary of arguments by name")


def _refusal(argument: str, reason: str) -> UsageError:
    return UsageError(f"{argument}: {reason}", code="split-argument")
