"""Imports `package.module:function`, and calls it, for everything a user may bring along."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoupled_pp.core.errors import UsageError


def import_factory(reference: str, key: str) -> Callable[..., Any]:
    """Import what `reference` (`package.module:function`, from the setting `key`) names, else raise UsageError."""
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise UsageError(
            f"`{key}`: {reference!r} must look like package.module:function", code="factory-unreadable", key=key
        )
    here = str(Path.cwd())  # a console script such as `dpp`, unlike `python -m`, does not search it
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:  # it is not there, or whatever its own code does when it is run
        raise UsageError(
            f"`{key}`: cannot import {reference!r}: {type(error).__name__}: {error}; check name, PYTHONPATH and module",
            code="factory-not-importable",
            key=key,
        ) from error
    if function is None:
        raise UsageError(
            f"`{key}`: module {module_name!r} has no {name!r}; name a function of it", code="factory-missing", key=key
        )
    if not callable(function):
        raise UsageError(
            f"`{key}`: {reference!r} is a {type(function).__name__}, not a function; name a function",
            code="factory-not-callable",
            key=key,
        )
    return function  # type: ignore[no-any-return]


def call_factory(reference: str, key: str, *given: object, **arguments: Any) -> Any:
    """Call what `reference` names with what we give and the settings' `arguments`; UsageError if it takes others."""
    function = import_factory(reference, key)
    try:
        inspect.signature(function).bind(*given, **arguments)
    except TypeError as error:
        raise UsageError(
            f"`{key}`: {reference!r} does not take the arguments {arguments}: {error}; give those it takes",
            code="factory-arguments",
            key=key,
        ) from None
    except ValueError:  # some functions written in C have no signature
        pass
    return function(*given, **arguments)
