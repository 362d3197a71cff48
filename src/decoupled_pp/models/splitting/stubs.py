"""Copies of a model in which stubs stand for the parts on other stages: its own `forward` runs around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.torch_private import pytree
from decoupled_pp.models.splitting.wiring import TENSOR, BlockWiring


class AllBlocksCalled(Exception):
    """Raised when the last block is called: what the model does after it does not matter to the entry."""


class MissingPartStub(nn.Module):
    """Placeholder for a submodule that lives on another stage.

    Returns NaNs of the right shape, so that accidental use shows in the output. The shapes come from a copy of the
    submodule on the meta device, so they are right for inputs of any size. Its attributes are the submodule's: code
    around it may read a flag, ask whether a part is there, or look at a weight.

    Attributes:
        results: What to return instead from its first calls: results that have travelled.
        weights_read: Names of the weights that were read from it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # nn.Module would register the copy as a submodule, and its parameters would appear in state_dict().
        object.__setattr__(self, "_shapes", _meta_copy(module))
        self.training = module.training
        self.results: list[Any] = []
        self.weights_read: set[str] = set()

    def train(self, mode: bool = True) -> MissingPartStub:
        """Set the mode, also of the parts that the stub shows."""
        self._like.train(mode)
        super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return a result that has travelled, or NaNs on the device of the first tensor given."""
        if self.results:
            return self.results.pop(0)
        given = pytree.tree_leaves((args, kwargs))
        device = next((leaf.device for leaf in given if isinstance(leaf, Tensor)), torch.device("cpu"))
        # On the meta device only shapes are computed, whatever the submodule would cost.
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with torch.no_grad():
            result = self._like(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda tensor: nan_like(tensor, device), result)

    @property
    def _like(self) -> nn.Module:
        found: nn.Module = self.__dict__["_shapes"]
        return found

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the submodule; NaNs in place of a tensor."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # of the copy protocol, which must see the stub
                raise
            value = getattr(object.__getattribute__(self, "_shapes"), name)
        if isinstance(value, Tensor):
            self.weights_read.add(name)
            return nan_like(value, torch.get_default_device()).requires_grad_(value.requires_grad)
        return value


class BeyondBlocksStub(MissingPartStub):
    """Placeholder for a part that is called after the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: all blocks have been called, or left out."""
        raise AllBlocksCalled


class BlockStub(MissingPartStub):
    """Looks like a block to the code that calls it."""

    def __init__(self, block: nn.Module, wiring: BlockWiring) -> None:
        super().__init__(block)
        self.wiring = wiring


class RecordingStub(BlockStub):
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


class PassThroughStub(BlockStub):
    """Returns the hidden state it is given, or the one in `hidden`.

    Attributes:
        hidden: What to return.
        called: Called before it returns, once.
    """

    hidden: Tensor | None = None
    called: Callable[[], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would return, its other tensors empty."""
        given: Tensor = pytree.tree_leaves((args, kwargs))[self.wiring.hidden_in]
        if self.called is not None:
            self.called()
            self.called = None
        return self.wiring.result(given if self.hidden is None else self.hidden)


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


def _same(left: object, right: object) -> bool:
    if left is right:
        return True
    try:
        return bool(left == right)
    except Exception:  # arrays and some library objects cannot be compared
        return type(left) is type(right)
