"""Calls the user's own data function."""

from __future__ import annotations

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.settings.sections import FactoryData


def open_custom(settings: FactoryData, seed: int) -> Data:
    """Call `function(settings, seed, **arguments)`."""
    data = call_factory(settings.factory, "data.factory", settings, seed, **settings.arguments)
    if not isinstance(data, Data):
        raise UsageError(
            f"`data.factory` {settings.factory!r} returned {type(data).__name__}; return a decoupled_pp.Data",
            code="factory-wrong-result",
            key="data.factory",
        )
    return data
