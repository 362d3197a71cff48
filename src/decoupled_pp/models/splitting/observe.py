"""One forward pass of a model, watched: which of its parts were called, in which order, with what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from decoupled_pp.core.errors import UsageError


@dataclass
class Call:
    """A call of a module.

    Attributes:
        module: Which.
        begin: Its place in the order of all beginnings and ends.
        end: The same for its end.
        given: Leaves of (args, kwargs).
        given_form: How the leaves make up (args, kwargs).
        made: Leaves of the result.
        made_form: How they make up the result.
    """

    module: nn.Module
    begin: int
    given: list[Any]
    given_form: pytree.TreeSpec
    end: int = -1
    made: list[Any] = field(default_factory=list)
    made_form: pytree.TreeSpec | None = None


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As pytree does, and into dataclasses, which it is told of the first time one is met."""
    leaves, form = pytree.tree_flatten(value)
    kinds = {
        type(leaf)
        for leaf in leaves
        if is_dataclass(leaf) and any(isinstance(one, torch.Tensor) for one in vars(leaf).values())
    }
    for kind in kinds:
        pytree.register_dataclass(kind)
    return _flatten(value) if kinds else (leaves, form)


def observe(run: Callable[[], object], modules: Iterable[nn.Module]) -> list[Call]:
    """Every call of these modules while `run` runs, without gradients; the tensors of the calls are kept.

    Args:
        run: Calls the model.
        modules: Parts of it to watch.
    """
    calls: list[Call] = []
    clock = iter(range(1_000_000_000))

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, form = _flatten((args, dict(kwargs)))
        calls.append(Call(module, next(clock), leaves, form))

    def ends(module: nn.Module, _args: object, _kwargs: object, result: object) -> None:
        call = next(call for call in reversed(calls) if call.module is module and call.end < 0)
        call.made, call.made_form = _flatten(result)
        call.end = next(clock)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            for handle in (
                module.register_forward_pre_hook(begins, with_kwargs=True),
                module.register_forward_hook(ends, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        run()
    return calls


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The `nn.ModuleList` that the model mostly consists of: the one with the most parameters, outermost first.

    Returns:
        Its name and itself.

    Raises:
        UsageError: There is none with more than one entry.
    """
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no nn.ModuleList of repeated blocks; pass its layers as a list, or trace it"
        )
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))


def units(model: nn.Module, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The outermost parts of the model that hold none of the blocks, by name."""
    own = {id(part) for part in blocks.modules()}
    found: dict[str, nn.Module] = {}

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if child is blocks:
                continue
            if any(id(part) in own for part in child.modules()):
                walk(child, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = child

    walk(model, "")
    return found
