"""Messages of `dpp` on standard error, and its exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from decoupled_pp.core import environment

FAILED = 1
USAGE = 2
INTERRUPTED = 130
TERMINATED = 143


def say(text: str) -> None:
    """Writes one line to standard error."""
    sys.stderr.write("dpp: " + " ".join(text.split()) + "\n")
    sys.stderr.flush()


class _Lines(logging.Handler):
    """Prints messages on standard output at once, also into a pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.write(record.getMessage() + "\n")
        sys.stdout.flush()


@contextmanager
def phases_shown() -> Iterator[None]:
    """Print what the package logs (a line for every phase of a run's start), on rank 0 alone."""
    logger = logging.getLogger("decoupled_pp")
    before = (logger.level, logger.propagate)
    lines = _Lines()
    if environment.rank() == 0:
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the user's code may have set up the root logger, which would print them again
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before[0])
        logger.propagate = before[1]
