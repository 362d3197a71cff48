"""Finds modules of a traced model that compute one thing in training and another in evaluation.

A trace contains only one of the two, so these modules must stay as they are. Modules of `torch.nn` stay anyway.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree

_UNPACK = str(operator.getitem)
_FIXED_MODE = ("dropout", "batch_norm", "instance_norm", "rrelu")  # operators that take the mode as an argument
_WHOLE = {"", "model"}  # names of the whole model in a trace


def functional_calls(parts: Sequence[nn.Module], whole: nn.Module) -> dict[str, list[str]]:
    """Return the operators that the parts call outside of modules of `torch.nn`, by the name of the calling module."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for name, module in part.named_modules():
            graph = getattr(module, "graph", None)
            if not isinstance(graph, fx.Graph) or own_module(whole, name, ()) is not None:
                continue
            calls = [_call_text(node) for node in graph.nodes if node.op == "call_function"]
            found.setdefault(name, []).extend(call for call in calls if not call.startswith(_UNPACK))
    return found


def _call_text(node: fx.Node) -> str:
    """Return a call as text, with all arguments that are no tensors of the trace."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: "*")
    return f"{node.target} {args} {kwargs}"


def mode_dependent(
    parts: Sequence[nn.Module], evaluation: Mapping[str, list[str]], training: Mapping[str, list[str]]
) -> set[str]:
    """Return the names of modules whose trace in training differs from that in evaluation.

    They can stay as they are if the trace tells how they are called: with one tensor, for one tensor; any other is
    refused. `evaluation` and `training` are the `functional_calls` of the model in the two modes.
    """
    # A module that asks for its mode makes other calls in the two traces; an operator that takes the mode as an
    # argument is known by its name.
    asking = {name for name in {*evaluation, *training} if evaluation.get(name, []) != training.get(name, [])}
    fixed: dict[str, str] = {}
    for name, calls in training.items():
        for call in calls:
            if any(word in call for word in _FIXED_MODE):
                fixed[name] = call
    for name in sorted(asking | set(fixed)):
        holders = [part for part in parts if name in dict(part.named_modules())]
        if name not in _WHOLE and len(holders) == 1 and _is_unary(holders[0], name):
            continue
        if name in fixed:
            raise _cannot_stay(name, f"calls {fixed[name].split()[0]} itself")
        raise _cannot_stay(name, "asks whether it trains (self.training)")
    return asking | set(fixed)


def refuse_extra_arguments(whole: nn.Module, inputs: tuple[Tensor, ...], kept: Container[str]) -> None:
    """Check that the model calls the modules that stay with one tensor and nothing else.

    A trace tells which tensors go into a module, but not which flags or numbers.
    """
    faulty: list[str] = []

    def hook_for(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if len(pytree.tree_leaves((args, dict(kwargs)))) != 1:
                faulty.append(name)

        return look

    with ExitStack() as hooks, torch.no_grad():
        for name, module in whole.named_modules():
            if name in kept:
                handle = module.register_forward_pre_hook(hook_for(name), with_kwargs=True)
                hooks.callback(handle.remove)
        whole(*inputs)
    if faulty:
        raise _cannot_stay(faulty[0], "asks whether it trains and is given more than a tensor")


def _cannot_stay(name: str, reason: str) -> UsageError:
    place = "the model" if name in _WHOLE else name.removeprefix("model.")
    return UsageError(
        f"{place} {reason}, and a trace would fix its mode; use a module of torch.nn for it, or one of "
        "your own that takes one tensor and returns one",
        code="mode-fixed-by-trace",
    )


def _is_unary(part: nn.Module, name: str) -> bool:
    """Return whether a module of a trace takes one tensor and returns one."""
    nodes = list(part.get_submodule(name).graph.nodes)  # type: ignore[union-attr, arg-type]
    result = next(node for node in nodes if node.op == "output").args[0]
    return sum(node.op == "placeholder" for node in nodes) == 1 and isinstance(result, fx.Node)


def own_module(whole: nn.Module, name: str, kept: Container[str]) -> nn.Module | None:
    """Return the model's own module under a name of its trace, if it is in `kept`, or of `torch.nn` without parts."""
    module = module_of(whole, name)
    if module is None or not name:
        return None
    is_plain = type(module).__module__.startswith("torch.nn.") and not list(module.children())
    return module if is_plain or name in kept else None


def module_of(whole: nn.Module, name: str) -> nn.Module | None:
    """Return the model's own module under a name of its trace, if there is one."""
    try:
        return whole.get_submodule(plain_name(name))
    except AttributeError:
        return None


def plain_name(name: str) -> str:
    """Return a name without the numbers that a trace gives to modules and parameters that are used again."""
    return re.sub(r"@\d+", "", name)
