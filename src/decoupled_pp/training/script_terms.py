"""Translates faults into the words of a script: `clip_norm`, where a settings file says `training.clip_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from decoupled_pp.core.errors import ReportedError
from decoupled_pp.settings.script_names import SCRIPT_NAMES


@contextmanager
def script_terms() -> Iterator[None]:
    """Let an error that leaves this context name settings as a script does; also a decorator of public calls."""
    try:
        yield
    except ReportedError as error:
        error.speak(SCRIPT_NAMES)
        raise
