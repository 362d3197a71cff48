"""Every private name of torch that the package uses, each behind one function.

Private names may go with any release of torch. `tests/core/test_torch_private.py` tries each of them and refuses those
in any other file. All are there from torch 2.8 (the oldest that is supported) to 2.14.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

M = TypeVar("M", bound=nn.Module)

pytree = _pytree
"""Functions for nested containers of tensors; torch has no public module of them."""

DispatchMode = TorchDispatchMode
"""Base of contexts that see every operation of torch; it has no public name."""

OVERRIDDEN = {
    "torch.nn.Module._load_from_state_dict": "`Layers` resolves keys with dots, which torch would split",
    "torch.distributed.pipelining.PipelineStage._compute_outputs": "the trial run for shapes leaves no trace",
    "torch.distributed.pipelining.PipelineStage._compute_input_grads": "the trial run announces gradients as they go",
    "torch.distributed.pipelining.PipelineStage._prepare_backward_infra": "the trial run's loss is no micro-batch's",
}
"""Private methods that classes of the package override, and why; torch calls them."""

BY_NAME = {
    "torch.nn.MultiheadAttention._reset_parameters": "fresh copies of layers for critics",
}
"""Private names that the package compares or looks up as strings, and why."""


def is_container(value: Any) -> bool:
    """Returns whether torch looks into a value, or into values of a class, instead of taking it as a leaf."""
    kind = value if isinstance(value, type) else type(value)
    return kind in pytree.SUPPORTED_NODES or pytree.is_namedtuple_class(kind)


def split_container(value: Any) -> tuple[list[Any], Any]:
    """Returns the items of a container, and what it keeps beside them (the keys of a dictionary); see `of_items`."""
    if pytree.is_namedtuple_class(type(value)):
        return list(value), None  # torch keeps the class
    items, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return list(items), context


def of_items(kind: type, items: list[Any], context: Any) -> Any:
    """Returns a container of this class."""
    if pytree.is_namedtuple_class(kind):
        return kind(*items)
    return pytree.SUPPORTED_NODES[kind].unflatten_fn(items, context)


def coo_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns indices and values of a sparse tensor, in its memory; the public ones refuse what is not coalesced."""
    return tensor._indices(), tensor._values()


def child_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the children by name, to read or to change."""
    # `named_children()` leaves out `None` and a module that comes twice, and `add_module` refuses names with dots.
    return module._modules


def shallow_copy(module: M) -> M:
    """Returns a copy with tables of its own for children, parameters and buffers, which still hold the same ones."""
    copied = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        vars(copied)[table] = dict(vars(module)[table])
    return copied


def version_of(tensor: Tensor) -> int:
    """Returns a number that grows whenever the memory of a tensor is changed in place."""
    return tensor._version


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


def operator_name(operator: Any) -> str:
    """Returns the name of an operator that a `DispatchMode` sees, as aten::relu."""
    return str(operator._schema.name)


def writes_in_place(operator: Any) -> bool:
    """Returns whether an operator that a `DispatchMode` sees changes an argument."""
    return bool(operator._schema.is_mutable)


def nested_from_lengths(padded: Tensor, lengths: Tensor) -> Tensor:
    """Returns the nested tensor of the first rows of each sample, as `nn.TransformerEncoder` makes it of a mask."""
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return torch._nested_tensor_from_mask(padded, mask, mask_check=False)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether something is registered on calls of this very module, forward or backward."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Returns the hooks that run after forward, by their number; what is taken out of it is unregistered."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """Returns the hooks that run before forward; the older weight_norm and spectral_norm are such."""
    return list(module._forward_pre_hooks.values())


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Returns what `torch.compile` has wrapped in this module; None if it is no such wrapper."""
    return module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None


def compile_in_place(wrapper: nn.Module) -> nn.Module:
    """Returns the module in a wrapper of `torch.compile`, compiled in place with the wrapper's options."""
    original = wrapper._modules["_orig_mod"]
    assert original is not None
    compiled: Any = wrapper
    call: Any = original._call_impl

    def run(*given: Any, **named: Any) -> Any:
        return call(*given, **named)

    # A code object for each, by which the compiler counts its versions (`pipeline/compiled.py`).
    own = FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    original._compiled_call_impl = compiled.dynamo_ctx(own)
    return original


def uncompiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the function as one that the compiler leaves alone, if it is in use: it would trace what layers call."""
    compiler = sys.modules.get("torch._dynamo")
    return function if compiler is None else cast("Callable[[Any], Any]", compiler.disable(function))


def storage_address(storage: torch.UntypedStorage) -> int:
    """Returns the address of a storage object: unlike `data_ptr()`, unique also for empty and for meta tensors."""
    return cast(int, storage._cdata)


@contextmanager
def saved_tensors_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Iterator[None]:
    """Runs with hooks for saved tensors that step aside while torch.func, which refuses any, differentiates."""
    with hooks_aside(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def hooks_aside() -> Iterator[None]:
    """Lets all hooks for saved tensors, whosever they are, step aside while torch.func differentiates."""
    graph = torch.autograd.graph
    stack: Any = torch._C._autograd
    refuse_hooks = graph.disable_saved_tensors_hooks  # torch.func looks it up there whenever it begins

    @contextmanager
    def aside(error_message: str) -> Iterator[None]:
        hooks = []
        while (top := stack._top_saved_tensors_default_hooks(True)) is not None:
            hooks.append(top)
            stack._pop_saved_tensors_default_hooks()
        try:
            with refuse_hooks(error_message):
                yield
        finally:
            for pack, unpack in reversed(hooks):
                stack._push_saved_tensors_default_hooks(pack, unpack)

    graph.disable_saved_tensors_hooks = aside
    try:
        yield
    finally:
        graph.disable_saved_tensors_hooks = refuse_hooks


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
