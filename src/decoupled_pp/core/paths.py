"""Reads paths as people write them: `~`, `~name` and `$NAME` stand for what they stand for in a shell."""

from __future__ import annotations

import os
import re
from pathlib import Path

from decoupled_pp.core.errors import UsageError, shown

_VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})")


def expanded(path: str | Path) -> str:
    """Return the path with its home folder and variables put in, otherwise as it was written; or raise UsageError."""
    text = os.path.expandvars(path)
    if "\0" in text:
        raise _unusable(text, "holds a NUL character; leave it out")
    if not text.strip():
        raise _unusable(text, "is empty; give a path")
    if left := _VARIABLE.search(text):  # it would become a folder called $NAME
        raise _unusable(text, f"names {left[0]}, which is not set; set it, or write the path out")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise _unusable(text, "begins with a user whose home is not known; if ~ is part of a name, write ./~") from None


def _unusable(text: str, fault: str) -> UsageError:
    return UsageError(f"{shown(text)} {fault}", code="unusable-path")
