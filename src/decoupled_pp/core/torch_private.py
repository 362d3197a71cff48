"""Every private name of torch that the package uses, each behind one function.

Private names may go with any release of torch. `tests/core/test_torch_private.py` tries each of them and refuses those
in any other file. All are there from torch 2.8 (the oldest that is supported) to 2.14.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree

pytree = _pytree
"""Functions for nested containers of tensors; torch has no public module of them."""

OVERRIDDEN = {
    "torch.nn.Module._load_from_state_dict": "`Layers` resolves keys with dots, which torch would split",
    "torch.distributed.pipelining.PipelineStage._compute_outputs": "the trial run for shapes leaves no trace",
    "torch.distributed.pipelining.PipelineStage._prepare_backward_infra": "the trial run's loss is no micro-batch's",
}
"""Private methods that classes of the package override, and why; torch calls them."""

BY_NAME = {
    "torch.nn.MultiheadAttention._reset_parameters": "fresh copies of layers for critics",
}
"""Private names that the package compares or looks up as strings, and why."""


def child_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the children by name, to read or to change."""
    # `named_children()` leaves out `None` and a module that comes twice, and `add_module` refuses names with dots.
    return module._modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the parameters of the module itself, shared ones included, to read or to change."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns the buffers of the module itself, shared ones included, to read or to change."""
    return module._buffers


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Returns the names of the module's own buffers that `state_dict` leaves out, to read or to change."""
    return module._non_persistent_buffers_set


def size_symbols(size: int | torch.SymInt) -> set[Any]:
    """Returns the symbols in a size of a trace; none for a number."""
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def size_value(size: int | torch.SymInt, values: Mapping[Any, int]) -> int:
    """Returns what a size of a trace is for these values of its symbols. `int(size)` would fix them in the trace."""
    return size if isinstance(size, int) else int(size.node.expr.subs(dict(values)))


def is_same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Returns whether two sizes of a trace are one formula. `left == right` might make them so in the trace."""
    formulas = [size if isinstance(size, int) else size.node.expr for size in (left, right)]
    return bool(formulas[0] == formulas[1])


def size_range(size: int | torch.SymInt, constraints: Mapping[Any, Any]) -> tuple[float, float]:
    """Returns the smallest and the largest value of a size for which a trace holds, from the trace's constraints."""
    if isinstance(size, int):
        return size, size
    found = constraints.get(size.node.expr)
    # A trace takes sizes of 0 and 1 for constants, so its ranges begin at 2 although it holds for them as well.
    least = 0.0 if found is None or found.lower <= 2 else float(found.lower)
    return least, float("inf") if found is None or found.upper > 2**31 else float(found.upper)


def is_without_data(tensor: Tensor) -> bool:
    """Returns whether a tensor was made in a trace, or by `tensors_without_data`."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def tensors_without_data() -> AbstractContextManager[Any]:
    """Returns a context that may be entered again, whose tensors have a shape, a dtype and a device, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def causal_masks_asked_by(asks: Callable[..., Any]) -> Iterator[None]:
    """Makes torch's transformers ask this function whether a mask is causal; their own looks at values."""
    from torch.nn.modules import transformer

    own = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = asks
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = own


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Silences what torch's tracer logs of errors that it raises as well."""
    logs = [
        logging.getLogger(f"torch.{name}")
        for name in ("_subclasses.fake_tensor", "_export", "export", "fx.experimental")
    ]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Run torch's attention as in training: in evaluation it has a fused kernel, which rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def nested_from_lengths(padded: Tensor, lengths: Tensor) -> Tensor:
    """Returns the nested tensor of the first rows of each sample, as `nn.TransformerEncoder` makes it of a mask."""
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return torch._nested_tensor_from_mask(padded, mask, mask_check=False)


def storage_address(storage: torch.UntypedStorage) -> int:
    """Returns the address of a storage object: unlike `data_ptr()`, unique also for empty and for meta tensors."""
    return cast(int, storage._cdata)


def default_store() -> dist.Store:
    """Returns the store that the default process group was made with; there is no public way to it."""
    return dist.distributed_c10d._get_default_store()


def backend_of(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Returns the group's backend for a kind of device."""
    # Calls through the group itself pass torch's dispatcher, at 10 to 50 microseconds each.
    return cast(dist.ProcessGroup, group._get_backend(device))


def compiler_config() -> Any:
    """Returns the settings of torch's compiler. The import takes seconds, so it is made when something is compiled."""
    from torch._dynamo import config

    return config


def recompile_limit_hit() -> type[Exception]:
    """Returns what the compiler raises instead of falling back to eager (`fail_on_recompile_limit_hit`)."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return FailOnRecompileLimitHit
