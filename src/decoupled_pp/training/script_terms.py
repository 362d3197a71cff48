"""Translates faults into the words of a script: `clip_norm`, where a settings file says `training.clip_norm`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from decoupled_pp.core import environment
from decoupled_pp.core.errors import PeerError, ReportedError, UsageError, one_line
from decoupled_pp.links import first_to_report
from decoupled_pp.settings.script_names import SCRIPT_NAMES


@contextmanager
def script_terms() -> Iterator[None]:
    """Let an error that leaves this context name settings as a script does; also a decorator of public calls."""
    try:
        yield
    except ReportedError as error:
        error.speak(SCRIPT_NAMES)
        if environment.reaches_others():
            _say_once()
        raise


def _say_once() -> None:
    """Let the ranks of a script print one traceback between them for a fault that ends all."""
    if getattr(sys.excepthook, "says_once", False):
        return
    show = sys.excepthook

    def show_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, PeerError):
            if not error.fault.usage:
                sys.stderr.write(one_line(f"rank {environment.rank()} ended: {error}") + "\n")
        elif not isinstance(error, UsageError) or first_to_report(str(error), _PATIENCE_SECONDS):
            show(kind, error, trace)

    show_once.says_once = True  # type: ignore[attr-defined]
    sys.excepthook = show_once


_PATIENCE_SECONDS = 30.0
"""How long a rank that ends looks for the launcher's store."""
