"""Which modules of a traced model compute one thing in training and another in evaluation, and so must stay."""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from decoupled_pp.core.errors import UsageError

_UNPACK = str(operator.getitem)
_FIXED_MODE = ("dropout", "batch_norm", "instance_norm", "rrelu")


def calls_of(parts: Sequence[nn.Module], whole: nn.Module) -> dict[str, list[str]]:
    """What the parts compute outside of modules of `torch.nn`, by the name of the module that does it."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(graph := getattr(module, "graph", None), fx.Graph) and own_module(whole, name, ()) is None:
                calls = [_told(node) for node in graph.nodes if node.op == "call_function"]
                found.setdefault(name, []).extend(call for call in calls if not call.startswith(_UNPACK))
    return found


def _told(node: fx.Node) -> str:
    """A call with all that is no tensor of the trace."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: "*")
    return f"{node.target} {args} {kwargs}"


def moody(
    parts: Sequence[nn.Module], evaluation: Mapping[str, list[str]], training: Mapping[str, list[str]]
) -> set[str]:
    """The modules that compute one thing in training and another in evaluation: a trace would keep one of the two.

    They stay as they are, if the trace tells how they are called: with one tensor, for one tensor.

    Raises:
        UsageError: One that cannot stay.
    """
    found = {name for name in {*evaluation, *training} if evaluation.get(name, []) != training.get(name, [])}
    fixed = {name: op for name, ops in training.items() for op in ops if any(word in op for word in _FIXED_MODE)}
    for name in sorted(found | set(fixed)):
        holders = [part for part in parts if _has(part, name)]
        if name not in {"", "model"} and len(holders) == 1 and _is_simple(holders[0], name):
            continue
        what = f"calls {fixed[name].split()[0]} itself" if name in fixed else "asks whether it trains (self.training)"
        raise _cannot_stay(name, what)
    return found | set(fixed)


def _cannot_stay(name: str, what: str) -> UsageError:
    place = name.removeprefix("model.") if name not in {"", "model"} else "the model"
    return UsageError(
        f"{place} {what}, and a trace would keep it in one mode for ever; use a module of torch.nn for it, or one of "
        "your own that takes one tensor and gives one"
    )


def refuse_told(whole: nn.Module, inputs: tuple[Tensor, ...], kept: Container[str]) -> None:
    """Raises UsageError if the model calls a module that is to stay with more than a tensor: no trace tells what."""
    told: list[str] = []

    def look(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(pytree.tree_leaves((args, dict(kwargs)))) != 1:
            told.append(name)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in whole.named_modules():
            if name in kept:
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
                )
                hooks.callback(hook.remove)
        whole(*inputs)
    if told:
        raise _cannot_stay(told[0], "asks whether it trains and is given more than a tensor")


def _has(part: nn.Module, name: str) -> bool:
    return name in dict(part.named_modules())


def _is_simple(part: nn.Module, name: str) -> bool:
    """Whether a module takes one tensor and gives one, in a trace."""
    nodes = list(part.get_submodule(name).graph.nodes)  # type: ignore[union-attr, arg-type]
    result = next(node for node in nodes if node.op == "output").args[0]
    return sum(node.op == "placeholder" for node in nodes) == 1 and isinstance(result, fx.Node)


def own_module(whole: nn.Module, name: str, kept: Container[str]) -> nn.Module | None:
    """The model's own module under a name of its trace, if it is to be kept or one of torch's without parts."""
    module = module_of(whole, name)
    if module is None or not name:
        return None
    plain = type(module).__module__.startswith("torch.nn.") and not list(module.children())
    return module if plain or name in kept else None


def module_of(whole: nn.Module, name: str) -> nn.Module | None:
    """The model's own module under a name of its trace, if there is one."""
    try:
        return whole.get_submodule(plain_name(name))
    except AttributeError:
        return None


def plain_name(name: str) -> str:
    """The name of a module or parameter that the trace has numbered because it is used again."""
    return re.sub(r"@\d+", "", name)
