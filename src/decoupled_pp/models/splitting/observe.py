"""Watches one forward pass of a model: which of its parts were called, in which order, with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, is_dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.cutting.layers import is_plain_sequential


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
        leaves, form = flat((args, dict(kwargs)))
        calls.append(Call(modules[module], next(clock), leaves, form))

    def after(module: nn.Module, _args: object, _kwargs: object, result: object) -> None:
        # A module may be called again before its first call has ended: the latest open call is the one that ends.
        call = next(call for call in reversed(calls) if call.module is modules[module] and call.end < 0)
        call.made, call.made_form = flat(result)
        call.end = next(clock)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        return run(), calls


def flat(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten as pytree does, and dataclasses too: pytree must be told of each class before it looks inside."""
    leaves, form = pytree.tree_flatten(value)
    unknown = {type(leaf) for leaf in leaves if is_dataclass(leaf) and _has_tensors(leaf)}
    for kind in unknown:
        pytree.register_dataclass(kind)
    return flat(value) if unknown else (leaves, form)


def _has_tensors(value: object) -> bool:
    return any(isinstance(one, Tensor) for one in vars(value).values())


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's repeated blocks by name.

    They are the children of the `nn.ModuleList` with the most parameters. Or, if an `nn.Sequential` has more: the
    children of its most frequent class, and all others of that class, as networks of several widths have them.
    """
    lists: list[tuple[int, str, nn.Module]] = []
    for name, part in model.named_modules():
        if (isinstance(part, nn.ModuleList) and len(part) > 1) or (is_plain_sequential(part) and _repeated_class(part)):
            lists.append((sum(parameter.numel() for parameter in part.parameters()), name, part))
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of repeated blocks; pass its layers as a "
            "list",
            code="no-block-list",
        )
    # Of equal ones max takes the first, and named_modules yields the outer before the inner.
    _, name, part = max(lists, key=lambda one: one[0])
    if isinstance(part, nn.ModuleList):
        return {_joined(name, key): block for key, block in part.named_children()}
    kind = _repeated_class(part)
    holders = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    found = {
        _joined(name, key): child for name, one in holders for key, child in one.named_children() if type(child) is kind
    }
    inner = {id(part) for block in found.values() for part in block.modules() if part is not block}
    return {name: block for name, block in found.items() if id(block) not in inner}


def _repeated_class(sequence: nn.Module) -> type[nn.Module] | None:
    """Return the most frequent class of composite children, if there are two or more of it."""
    kinds = Counter(
        type(child) for child in sequence.children() if not is_plain_sequential(child) and any(child.children())
    )
    kind, times = kinds.most_common(1)[0] if kinds else (None, 0)
    return kind if times > 1 else None


def parts_around(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return the outermost parts of the model that hold none of the blocks, by name."""
    whole = {id(block) for block in blocks}
    found: dict[str, nn.Module] = {}

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if id(child) in whole:
                continue
            if any(id(part) in whole for part in child.modules()):
                walk(child, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = child

    walk(model, "")
    return found


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
