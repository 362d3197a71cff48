"""Imports packages that only some settings need: the extra `hf`."""

from __future__ import annotations

import importlib
from types import ModuleType

from decoupled_pp.core.errors import UsageError


def import_extra(package: str, key: str, value: str) -> ModuleType:
    """Import a package of the extra `hf` that the setting `key` needs for its `value`; UsageError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"`{key}` {value} needs the package {package}; pip install 'decoupled_pp[hf]'",
            code="extra-missing",
            key=key,
        ) from None
