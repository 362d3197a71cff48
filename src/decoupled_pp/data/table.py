"""Opens data sets as seeded, resumable micro-batches: `open_data` and its table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from decoupled_pp.core.datasets import Data
from decoupled_pp.data.cifar_binary import open_cifar_binary
from decoupled_pp.data.custom import open_custom
from decoupled_pp.data.digits import open_digits
from decoupled_pp.data.huggingface import open_huggingface
from decoupled_pp.data.idx import open_idx
from decoupled_pp.data.text import open_python_source, open_text
from decoupled_pp.settings.sections import DataSettings

KINDS: dict[str, Callable[[Any, int], Data]] = {
    "digits": open_digits,
    "python_source": open_python_source,
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
