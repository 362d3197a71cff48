"""Copies of a model in which stubs stand for the parts on other stages: its own `forward` runs around them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import child_modules, pytree
from decoupled_pp.models.splitting.wiring import TENSOR, BlockWiring


class AllBlocksCalled(Exception):
    """Raised when the last block is called: what the model does after it does not matter to the entry."""


class Stub(nn.Module):
    """Stands for a module that is elsewhere."""


class _BlockStub(Stub):
    """Looks like a block to the code that calls it: has its plain attributes and the names of its parts."""

    def __init__(self, block: nn.Module, wiring: BlockWiring) -> None:
        super().__init__()
        # The model may read a flag of its block (an attention type, a layer index) before it calls it.
        for name, value in vars(block).items():
            if not name.startswith("_") and not hasattr(self, name) and not _holds_tensors(value):
                setattr(self, name, value)
        for name, part in child_modules(block).items():  # code around the blocks may ask whether a part is there
            self.register_module(name, None if part is None else nn.Identity())
        self.wiring = wiring


class RecordingStub(_BlockStub):
    """Records what the block is given (the leaves, in `given`), and returns its hidden state unchanged."""

    def __init__(self, block: nn.Module, wiring: BlockWiring, name: str, *, last: bool) -> None:
        super().__init__(block, wiring)
        self.name = name
        self.given: list[Any] = []
        self._last = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments; raises UsageError if more than tensors differs from the observed call."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        if form != self.wiring.given_form:
            raise UsageError(
                f"block {self.name!r} is called with other arguments than when the model was split; split it with a "
                "sample like the data",
                code="block-call-changed",
            )
        for leaf, expected in zip(leaves, self.wiring.given, strict=True):
            if expected is not TENSOR and not _same(leaf, expected):
                raise UsageError(
                    f"block {self.name!r} is given {leaf!r} where it was given {expected!r} when the model was "
                    "split; split it with a sample like the data",
                    code="block-call-changed",
                )
        self.given = leaves
        if self._last:
            raise AllBlocksCalled
        return self.wiring.result(leaves[self.wiring.hidden_in])


class PassThroughStub(_BlockStub):
    """Returns the hidden state it is given, or the one in `hidden`."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would return, its other tensors empty."""
        given: Tensor = pytree.tree_leaves((args, kwargs))[self.wiring.hidden_in]
        return self.wiring.result(given if self.hidden is None else self.hidden)


class MissingPartStub(Stub):
    """Placeholder for a submodule that lives on another stage.

    Returns NaNs of the right shape, so that accidental use shows in the output. The shapes come from a copy of the
    submodule on the meta device, so they are right for inputs of any size.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # nn.Module would register the copy as a submodule, and its parameters would appear in state_dict().
        object.__setattr__(self, "_shapes", _meta_copy(module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return NaNs, on the device of the first tensor given."""
        given = pytree.tree_leaves((args, kwargs))
        device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), torch.device("cpu"))
        # On the meta device only shapes are computed, whatever the submodule would cost.
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with torch.no_grad():
            result = self._shapes(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda tensor: nan_like(tensor, device), result)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the submodule: code around it may read its config, or a weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(object.__getattribute__(self, "_shapes"), name)
        return nan_like(value, torch.get_default_device()) if isinstance(value, Tensor) else value


def nan_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return NaNs shaped like a tensor, which show in every result they are used for; zeros if integers are needed."""
    fill = torch.nan if tensor.is_floating_point() else 0
    return torch.full(tensor.shape, fill, dtype=tensor.dtype, device=device or tensor.device)


def copy_replacing(model: nn.Module, replacements: Mapping[Any, Any]) -> nn.Module:
    """Return a deep copy of a model in which some modules and tensors are others; those given are not copied."""
    # `deepcopy` takes what its memo holds under an object's id for the copy that it has already made of it.
    return copy.deepcopy(model, {id(old): new for old, new in replacements.items()})


def _meta_copy(module: nn.Module) -> nn.Module:
    """Return a copy on the meta device, without ever copying the weights."""
    replacements: dict[Tensor, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        replacements[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy_replacing(module, replacements)


def _holds_tensors(value: object) -> bool:
    """Return whether a value is or holds a tensor or a module."""
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in pytree.tree_leaves(value))


def _same(left: object, right: object) -> bool:
    if left is right:
        return True
    try:
        return bool(left == right)
    except Exception:  # arrays and some library objects cannot be compared
        return type(left) is type(right)
