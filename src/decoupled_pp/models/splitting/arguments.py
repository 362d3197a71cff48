"""Refuses arguments of the splitting functions that are of another kind, before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy
from torch import Tensor, nn

from decoupled_pp.core.device import on_meta
from decoupled_pp.core.errors import UsageError, first_line, shown
from decoupled_pp.core.torch_private import pytree


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
    """Raise UsageError unless these are names of modules in an order, each of them once."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _refusal(argument, f"it is {names!r:.60}; give a list of names of modules, as named_modules() has them")
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise _refusal(argument, f"{twice!r} is named twice; give each name once")


def checked_stages(stages: Any) -> int | list[str] | tuple[str, ...]:
    """Return the number of stages as an int, or the names of modules to cut after."""
    if isinstance(stages, Integral) and not isinstance(stages, bool):
        if stages < 1:
            raise _refusal("stages", f"it is {stages}; give 1 or more")
        return int(stages)
    if not isinstance(stages, list | tuple) or not all(isinstance(name, str) for name in stages) or not stages:
        raise _refusal("stages", f"it is {stages!r:.60}; give a number, or a list of names of modules to cut after")
    check_names("stages", stages)
    return stages


def check_calls(output: object, options: object) -> None:
    """Raise UsageError unless `output` can be called and `options` are by name; either may be None."""
    if output is not None and not callable(output):
        raise _refusal("output", f"it is {output!r:.60}; give a function of the model's result")
    if options is not None and not isinstance(options, Mapping):
        raise _refusal("options", f"it is {options!r:.60}; give a dictionary of arguments by name")


def check_sample(model: nn.Module | Sequence[nn.Module], sample: Any) -> None:
    """Raise UsageError unless the sample holds tensors with something in them, where the model (or the list) is."""
    for key in sample if isinstance(sample, Mapping) else ():
        if not isinstance(key, str):
            raise _bad_sample(f"{shown(key)} is no name of an argument; name the inputs as the model's forward does")
    leaves = pytree.tree_leaves(dict(sample) if isinstance(sample, Mapping) else sample)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(isinstance(leaf, numpy.ndarray) for leaf in leaves):
        raise _bad_sample("it holds a NumPy array; give a tensor (torch.from_numpy)")
    if not tensors:
        raise UsageError("sample: it holds no tensor; give an input micro-batch", code="no-sample")
    if not any(tensor.numel() for tensor in tensors):
        raise _bad_sample("it is empty; give a micro-batch of two samples or so")
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    if on_meta(whole):
        return  # nothing is computed
    places = {one.device for one in (*whole.parameters(), *whole.buffers())}
    if places and all(tensor.device not in places for tensor in tensors):
        here, there = tensors[0].device, next(iter(places))
        raise _bad_sample(f"it is on {here}, and the model on {there}; make the sample there, or move it there")


def fails_on_sample(model: nn.Module, error: Exception) -> UsageError:
    """Return the error for a model that cannot be run on what was given."""
    return UsageError(
        f"{type(model).__name__} fails on the sample: {first_line(error)}; give a sample as its forward takes",
        code="model-fails-on-sample",
    )


def _bad_sample(fault: str) -> UsageError:
    return UsageError(f"sample: {fault}", code="bad-sample")


def _refusal(argument: str, reason: str) -> UsageError:
    return UsageError(f"{argument}: {reason}", code="split-argument")
