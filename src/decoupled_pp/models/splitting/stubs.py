"""Copies of a model in which stubs stand for the parts that are elsewhere: its own `forward` runs around them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.splitting.wiring import BlockWiring, Constant


class Reached(Exception):
    """All blocks have been called."""


class _Stub(nn.Module):
    """Looks like a block to the code that calls it: has its plain attributes and the names of its parts."""

    def __init__(self, block: nn.Module, wiring: BlockWiring) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if not name.startswith("_") and not hasattr(self, name) and not pytree_tensors(value):
                setattr(self, name, value)
        for name, part in block._modules.items():  # code around the blocks may ask whether a part is there
            self.register_module(name, None if part is None else nn.Identity())
        self.wiring = wiring

    def _hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        hidden: Tensor = pytree.tree_leaves((args, dict(kwargs)))[self.wiring.hidden_in]
        return hidden


class Noting(_Stub):
    """Notes what the block is given, and passes its hidden state on."""

    def __init__(self, block: nn.Module, wiring: BlockWiring, name: str, *, last: bool) -> None:
        super().__init__(block, wiring)
        self.name, self._last = name, last
        self.given: list[Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `Reached` for the last block, UsageError if more than tensors differs from the observed call."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        if form != self.wiring.form:
            raise UsageError(f"block {self.name!r} is called with other arguments than when the model was split")
        for leaf, expected in zip(leaves, self.wiring.leaves, strict=True):
            if isinstance(expected, Constant) and not _same(leaf, expected.value):
                raise UsageError(
                    f"block {self.name!r} is given {leaf!r} where it was given {expected.value!r} when the model was "
                    "split; split it with a sample like the data"
                )
        self.given = leaves
        if self._last:
            raise Reached
        return self.wiring.result(self._hidden(args, kwargs), torch.empty(0))


class Passing(_Stub):
    """Gives back the hidden state it is given, or the one that was put here."""

    def __init__(self, block: nn.Module, wiring: BlockWiring) -> None:
        super().__init__(block, wiring)
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block would return, its other tensors empty."""
        hidden = self._hidden(args, kwargs) if self.hidden is None else self.hidden
        return self.wiring.result(hidden, torch.empty(0))


class Absent(nn.Module):
    """Stands for a part that has a state and is elsewhere: NaN of the shapes that it would make, so no use is missed.

    The shapes come from a copy without storage (on the meta device), so they are right for inputs of any size.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_shapes", without_storage(module))  # no part of this module: its state is elsewhere

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """NaN, on the device of the first tensor given."""
        given = pytree.tree_leaves((args, kwargs))
        device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), torch.device("cpu"))
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with torch.no_grad():
            result = self._shapes(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda tensor: made_up(tensor, device), result)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(object.__getattribute__(self, "_shapes"), name)
        return made_up(value, torch.get_default_device()) if isinstance(value, Tensor) else value


def made_up(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor like this one that shows in every result it is used for: NaN, or zeros where there is none."""
    fill = torch.nan if tensor.is_floating_point() else 0
    return torch.full(tensor.shape, fill, dtype=tensor.dtype, device=device or tensor.device)


def without_storage(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without a copy of the weights."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def without_weights(module: nn.Module) -> bool:
    """Whether some of its parameters are on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def copy_with(model: nn.Module, replaced: Mapping[nn.Module, nn.Module], kept: Mapping[Tensor, Tensor]) -> nn.Module:
    """A deep copy of a model in which some modules and tensors are others; those given are taken as they are.

    Args:
        model: Stays as it is.
        replaced: Module of the model -> what stands in its place.
        kept: Parameter or buffer -> what stands in its place.
    """
    memo: dict[int, Any] = {id(old): new for old, new in replaced.items()}
    memo |= {id(old): new for old, new in kept.items()}
    return copy.deepcopy(model, memo)


def pytree_tensors(value: object) -> bool:
    """Whether a value is or holds a tensor or a module."""
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in pytree.tree_leaves(value))


def _same(left: object, right: object) -> bool:
    if left is right:
        return True
    try:
        return bool(left == right)
    except Exception:
        return type(left) is type(right)
