"""Keeps, and moves, what modules hold beside parameters: buffers and plain attributes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from decoupled_pp.core.structures import memory_of, write
from decoupled_pp.core.torch_private import forward_hooks, own_buffers, pytree

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_Restore: TypeAlias = Callable[[], Any]  # brings a value back to what it was, and returns it


class KeptState:
    """The buffers and plain attributes of modules at one moment: numbers, tensors, and lists, dictionaries of them.

    A layer may carry such state from packet to packet. Objects of other classes are kept by reference only. With
    `buffers=False` the attributes alone are kept.
    """

    def __init__(self, *modules: nn.Module, buffers: bool = True) -> None:
        self._parts = {part: _keep_part(part, buffers=buffers) for module in modules for part in module.modules()}

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the modules back to that moment; what forward has added since is removed."""
        for restore in self._parts.values():
            restore()


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, with the tensors that it holds as plain attributes, which torch leaves behind."""
    module.to(device)
    for part in module.modules():
        own = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
        for key, value in own.items():
            if any(_is_elsewhere(leaf, device) for leaf in pytree.tree_leaves(value)):
                moved = pytree.tree_map(lambda leaf: leaf.to(device) if _is_elsewhere(leaf, device) else leaf, value)
                vars(part)[key] = moved


def _is_elsewhere(leaf: object, device: torch.device) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and leaf.device != device


def _keep_part(part: nn.Module, *, buffers: bool) -> _Restore:
    kind = type(part)
    restore_buffers = _keep(own_buffers(part) if buffers else None)
    own = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
    # A tensor with a graph is computed anew by every forward pass (the weight under weight_norm), and cannot be copied.
    attributes = {key: _keep(value) for key, value in own.items() if getattr(value, "grad_fn", None) is None}

    hooks = set(forward_hooks(part))

    def restore() -> None:
        # Models of transformers register hooks in their first call and note it in an attribute, which goes as well.
        for number in forward_hooks(part).keys() - hooks:
            del forward_hooks(part)[number]
        if type(part) is not kind:  # a lazy module has become what it is for
            return
        restore_buffers()
        for key in vars(part).keys() - _OF_EVERY_MODULE - own.keys():
            del vars(part)[key]
        for key, value in attributes.items():
            vars(part)[key] = value()  # not setattr, which modules override

    return restore


def _keep(value: Any) -> _Restore:
    """Return what restores a value."""
    if isinstance(value, Tensor) and _has_content(value):
        return _keep_tensor(value)
    if isinstance(value, dict):
        entries = {key: _keep(entry) for key, entry in value.items()}
        return lambda: _refill(value, value.update, {key: entry() for key, entry in entries.items()})
    if isinstance(value, list | deque):
        items = [_keep(item) for item in value]
        return lambda: _refill(value, value.extend, [item() for item in items])
    if isinstance(value, tuple):
        return _keep_tuple(value)
    return lambda: value


def _keep_tuple(value: tuple[Any, ...]) -> _Restore:
    parts = [_keep(item) for item in value]

    def restore() -> tuple[Any, ...]:
        for part in parts:  # what they hold may have been changed in place
            part()
        return value

    return restore


def _has_content(tensor: Tensor) -> bool:
    """Return whether the values of a tensor are to be kept: not those of parameters, which training changes."""
    return not (isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.is_meta or tensor.is_nested)


def _keep_tensor(tensor: Tensor) -> _Restore:
    content = tensor.detach().clone()

    def restore() -> Tensor:
        pairs = zip(memory_of(tensor).values(), memory_of(content).values(), strict=True)
        if not all(torch.equal(now, before) for now, before in pairs):
            write(tensor, content)
        return tensor

    return restore


def _refill(container: Any, fill: Callable[[Any], None], content: Any) -> Any:
    container.clear()
    fill(content)
    return container
