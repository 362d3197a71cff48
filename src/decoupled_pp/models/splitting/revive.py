"""Turns a part of a `torch.export` trace back into modules that train, for batches of any size on any device."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from decoupled_pp.core.torch_private import non_persistent_buffers, own_buffers, own_parameters
from decoupled_pp.models.splitting.modes import module_of, own_module, plain_name

# Samples of the micro-batch that is traced: a multiple of 13 among sizes can hardly be anything but the batch.
TRACED_BATCH = 13

# A context variable, so that stages in several threads do not mix it up.
running_batch: ContextVar[tuple[int, torch.device]] = ContextVar("batch size and device of the running part")

# Operators that take sizes, in which the batch size of the trace is a constant.
_SIZED = {"view", "_unsafe_view", "reshape", "expand", "zeros", "ones", "full", "empty"}
_SIZED |= {"new_zeros", "new_ones", "new_full"}

_OPERATORS: dict[str, Callable[..., Any]] = {}  # those that are called through `_call_for_batch`, by name


def revive(part: nn.Module, whole: nn.Module, kept: Container[str]) -> None:
    """Put the model's own modules in place of their traces, and let the rest take any batch.

    Own modules follow `train()` and `eval()`; a trace has a fixed mode. `kept` names the modules of the user's own that
    stay; those of `torch.nn` stay anyway.
    """
    for name, module in list(part.named_modules()):  # a list, because modules are replaced on the way
        own = own_module(whole, name, kept)
        if own is not None:
            holder, _, key = name.rpartition(".")
            part.get_submodule(holder).register_module(key, own)
        elif "@" in name:
            _share_tensors(module, whole.get_submodule(plain_name(name)))
    _restore_buffer_persistence(part, whole)
    for module in part.modules():
        graph = getattr(module, "graph", None)
        if isinstance(graph, fx.Graph):
            for node in graph.nodes:
                _free_batch_and_device(node)
        if isinstance(module, fx.GraphModule):
            module.recompile()  # a graph module runs generated code, which knows nothing of the changed graph


def _share_tensors(module: nn.Module, original: nn.Module) -> None:
    """Give the trace of a second call of a module the module's tensors: the trace has copies of its own."""
    for tensors in (own_parameters(module), own_buffers(module)):
        tensors.update({key: getattr(original, key) for key, tensor in tensors.items() if tensor is not None})


def _restore_buffer_persistence(part: nn.Module, whole: nn.Module) -> None:
    """Leave out of `state_dict()` the buffers that the model leaves out: a trace would save all of them."""
    for name, module in part.named_modules():
        original = module_of(whole, name)
        if original is not None:
            non_persistent_buffers(module).update(non_persistent_buffers(original) & own_buffers(module).keys())


def _free_batch_and_device(node: fx.Node) -> None:
    """Let an operator follow the batch size and the device of the batch at hand."""
    if node.op != "call_function":
        return
    kind = str(node.target).split(".")[1:2]  # "aten.view.default" -> ["view"]; Python operators have no dots
    is_sized = bool(kind) and kind[0] in _SIZED and any(map(_holds_batch_size, node.args))
    if is_sized or "device" in node.kwargs:
        assert callable(node.target)
        name = str(node.target)
        # By name: arguments of a node are plain values, which the generated code can spell out.
        _OPERATORS[name] = node.target
        node.args = (name, *node.args)
        node.target = _call_for_batch


def _call_for_batch(operator_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an operator with the batch size and the device of the trace replaced by those of the batch at hand."""
    rows, device = running_batch.get()
    sized = [_resized(argument, rows) if _holds_batch_size(argument) else argument for argument in args]
    if "device" in kwargs:
        kwargs = {**kwargs, "device": device}
    return _OPERATORS[operator_name](*sized, **kwargs)


def _resized(sizes: list[Any] | tuple[Any, ...], rows: int) -> list[Any]:
    return [size // TRACED_BATCH * rows if _is_batch_size(size) else size for size in sizes]


def _holds_batch_size(argument: object) -> bool:
    return isinstance(argument, list | tuple) and any(map(_is_batch_size, argument))


def _is_batch_size(size: object) -> bool:
    return isinstance(size, int) and size != 0 and size % TRACED_BATCH == 0
