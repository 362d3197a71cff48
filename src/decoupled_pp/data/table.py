"""Opens data sets as seeded, resumable micro-batches: `open_data` and its table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.factory import call_factory
from decoupled_pp.data.cifar_binary import open_cifar_binary
from decoupled_pp.data.digits import open_digits
from decoupled_pp.data.huggingface import open_huggingface
from decoupled_pp.data.idx import open_idx
from decoupled_pp.data.look_up import open_look_up
from decoupled_pp.data.text import open_python_source, open_text
from decoupled_pp.settings.sections import DataSettings, FactoryData


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


KINDS: dict[str, Callable[[Any, int], Data]] = {
    "digits": open_digits,
    "python_source": open_python_source,
    "look_up": open_look_up,
    "text": open_text,
    "idx": open_idx,
    "cifar_binary": open_cifar_binary,
    "huggingface": open_huggingface,
    "factory": open_custom,
}
"""`data.kind` -> opener. A new kind is a file here, a class in `settings/sections.py` and a line in this table."""


def open_data(settings: DataSettings, seed: int) -> Data:
    """Open the data set a configuration names.

    Faults that are cheap to find (missing, truncated or malformed files) are found here. The samples themselves are
    read when `batches` is first called, so ranks that only need `info` hold no data.
    """
    return KINDS[settings.kind](settings, seed)
