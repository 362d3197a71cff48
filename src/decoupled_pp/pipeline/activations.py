"""Counts the exact bytes of activations that autograd keeps for a backward pass, through saved-tensor hooks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from decoupled_pp.core.packets import payload_bytes
from decoupled_pp.core.structures import memory_of
from decoupled_pp.core.torch_private import saved_tensors_hooks, storage_address, uncompiled

_View = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # byte offset, bytes, shape and strides in the storage


class SavedActivations:
    """Counts, while the context lasts, every tensor that autograd saves, each once; `peak` is the most bytes held.

    A tensor counts from the moment it is first saved until the last graph node that saved it lets go. Different views
    of one storage add up, but to no more than the storage; a view of a large data set counts as the view. Under
    activation checkpointing the count holds the tensors that stay saved between forward and backward, not those that
    backward recomputes for itself, one layer at a time. Storages of `excluded` (parameters, buffers) do not count, nor
    does what a layer saves that differentiates by torch.func inside its own forward.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {_storage_of(tensor)[0] for tensor in excluded}
        self._views: defaultdict[int, Counter[_View]] = defaultdict(Counter)
        self._bytes: Counter[int] = Counter()
        self._held = 0
        self.peak = 0
        # autograd keeps what `_pack` returns, and drops it with the graph node: its `__del__` tells when that is.
        self._hooks = saved_tensors_hooks(
            uncompiled(lambda tensor: _Saved(tensor, self)), uncompiled(lambda saved: saved.tensor)
        )

    def __enter__(self) -> SavedActivations:
        """Start counting."""
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting new tensors."""
        self._hooks.__exit__(kind, error, traceback)

    def change(self, saved: _Saved, by: int) -> None:
        """Count that a node saved this tensor (+1) or let go of it (-1)."""
        if saved.pointer in self._excluded:  # by storage: a transposed weight is saved as another tensor
            return
        views = self._views[saved.pointer]
        views[saved.view] += by
        if not views[saved.view]:
            del views[saved.view]
        size = min(saved.storage_bytes, sum(view[1] for view in views))  # views may overlap
        self._held += size - self._bytes[saved.pointer]
        self._bytes[saved.pointer] = size
        self.peak = max(self.peak, self._held)


class _Saved:
    """The object that a graph node holds instead of the tensor; it is deleted when the node lets go."""

    __slots__ = ("_meter", "pointer", "storage_bytes", "tensor", "view")

    def __init__(self, tensor: Tensor, meter: SavedActivations) -> None:
        self.tensor = tensor
        self._meter = meter
        self.pointer, self.storage_bytes = _storage_of(tensor)
        self.view: _View = (0, self.storage_bytes, tuple(tensor.shape), ())
        if tensor.layout is torch.strided:
            offset = int(tensor.storage_offset()) * tensor.element_size()
            self.view = (offset, tensor.nbytes, tuple(tensor.shape), tuple(tensor.stride()))
        meter.change(self, +1)

    def __del__(self) -> None:
        self._meter.change(self, -1)


def _storage_of(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of a tensor's storage; a sparse tensor goes by that of its values."""
    *_, values = memory_of(tensor).values()
    storage = values.untyped_storage()
    return storage_address(storage), storage.nbytes() if values is tensor else payload_bytes(tensor)
