"""Messages of `dpp` on standard error, and its exit codes."""

from __future__ import annotations

import sys

FAILED = 1
USAGE = 2
INTERRUPTED = 130
TERMINATED = 143


def say(text: str) -> None:
    """Writes one line to standard error."""
    sys.stderr.write("dpp: " + " ".join(text.split()) + "\n")
    sys.stderr.flush()
