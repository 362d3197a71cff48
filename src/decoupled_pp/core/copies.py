"""Copies modules, also those that hold what Python cannot copy."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from decoupled_pp.core.torch_private import child_modules, own_buffers, own_parameters, shallow_copy

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=Tensor)


def copy_of(module: M, *, own_weights: bool = True) -> M:
    """Return a deep copy of a module; if it cannot be copied, one with its own tensors that shares all else.

    A lock, an open file or a handle cannot be copied, and may well be shared. Without weights of its own the copy costs
    no memory to speak of, and must not be trained.
    """
    shared = {} if own_weights else {id(parameter): parameter for parameter in module.parameters()}
    try:
        return copy.deepcopy(module, _detached(module) | shared)
    except Exception:  # a user's module may raise anything when it is copied
        return _with_own_tensors(module, dict(shared))


def _detached(module: nn.Module) -> dict[int, Any]:
    """Return, for `deepcopy`, what stands for attributes with a graph (the last weight under weight_norm)."""
    values = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return {id(value): value.detach() for value in values if value.grad_fn is not None}


def _with_own_tensors(module: M, memo: dict[int, Any]) -> M:
    """Copy a module and those in it; `memo` holds the copies by the ids of what they are copies of, as in `copy`."""
    if id(module) not in memo:
        copied = shallow_copy(module)
        memo[id(module)] = copied
        _copy_tensors(own_parameters(copied), memo)
        _copy_tensors(own_buffers(copied), memo)
        for name, child in child_modules(copied).items():
            if child is not None:
                child_modules(copied)[name] = _with_own_tensors(child, memo)
    return cast(M, memo[id(module)])


def _copy_tensors(tensors: dict[str, T | None], memo: dict[int, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided and id(tensor) not in memo:  # torch cannot deep-copy some of these
            memo[id(tensor)] = tensor.detach().clone()
        tensors[name] = copy.deepcopy(tensor, memo)  # the memo keeps tied ones tied
