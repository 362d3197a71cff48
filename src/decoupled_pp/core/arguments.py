"""Checks what a script passes to public calls: values by their type, functions by how they will be called."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from decoupled_pp.core.errors import UsageError, shown


def expect(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise UsageError unless an argument is of one of these kinds; `wanted` says in words what to give."""
    if not isinstance(value, kinds):
        raise UsageError(f"{name} is {shown(value)}; give {wanted}", code="unusable-argument")


def expect_function(name: str, value: Any, given: int, wanted: str, *, key: str | None = None) -> None:
    """Raise UsageError unless a value can be called with so many arguments; a module is no such function."""
    if not callable(value) or isinstance(value, nn.Module):
        raise UsageError(f"{name} is {shown(value)}; give {wanted}", code="not-callable", key=key)
    expect_arguments(name, value, given, wanted, key=key)


def expect_arguments(name: str, value: Any, given: int, wanted: str, *, key: str | None = None) -> None:
    """Raise UsageError unless a function or a module can be called with so many arguments."""
    called_as = value.forward if isinstance(value, nn.Module) else value  # the call itself takes any arguments
    try:
        inspect.signature(called_as).bind(*[None] * given)
    except ValueError:  # some functions written in C have no signature
        pass
    except TypeError as error:
        called = getattr(value, "__name__", type(value).__name__)
        raise UsageError(
            f"{name}: {called} cannot be called with {given or 'no'} argument{'s' * (given != 1)} ({error}); give "
            f"{wanted}",
            code="not-callable",
            key=key,
        ) from None
