"""Watches one forward pass of a model: which of its parts were called, in which order, with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, is_dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree


@dataclass
class Call:
    """One call of a module; `begin` and `end` are positions in the order of all begins and ends."""

    module: nn.Module
    begin: int
    given: list[Any]  # leaves of (args, kwargs)
    given_form: pytree.TreeSpec
    end: int = -1  # not ended
    made: list[Any] = field(init=False)  # leaves of the result
    made_form: pytree.TreeSpec = field(init=False)


def observe(run: Callable[[], Tensor], modules: Mapping[nn.Module, nn.Module]) -> tuple[Tensor, list[Call]]:
    """Call `run` without gradients; return its result and all calls of some modules, which keep their tensors alive.

    `modules` maps each module to watch to the one that stands in its calls.
    """
    calls: list[Call] = []
    clock = count()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, form = _flatten((args, dict(kwargs)))
        calls.append(Call(modules[module], next(clock), leaves, form))

    def after(module: nn.Module, _args: object, _kwargs: object, result: object) -> None:
        # A module may be called again before its first call has ended: the latest open call is the one that ends.
        call = next(call for call in reversed(calls) if call.module is modules[module] and call.end < 0)
        call.made, call.made_form = _flatten(result)
        call.end = next(clock)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        return run(), calls


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten as pytree does, and dataclasses too: pytree must be told of each class before it looks inside."""
    leaves, form = pytree.tree_flatten(value)
    unknown = {type(leaf) for leaf in leaves if is_dataclass(leaf) and _has_tensors(leaf)}
    for kind in unknown:
        pytree.register_dataclass(kind)
    return _flatten(value) if unknown else (leaves, form)


def _has_tensors(value: object) -> bool:
    return any(isinstance(one, Tensor) for one in vars(value).values())


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and module of the `nn.ModuleList` with the most parameters: the model's repeated blocks."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no nn.ModuleList of repeated blocks; pass its layers as a list, or trace it",
            code="no-block-list",
        )
    # Of equal ones max takes the first, and named_modules yields the outer before the inner.
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))


def parts_around(model: nn.Module, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """Return the outermost parts of the model that hold none of the blocks, by name."""
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
