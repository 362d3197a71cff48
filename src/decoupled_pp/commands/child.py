"""Runs `dpp` in a child process with its output in a log, for commands that start many runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from decoupled_pp.core.reports import FinalScores


def run_dpp(log: Path, *arguments: str | Path) -> str | None:
    """Run a `dpp` command; its output is appended to `log`.

    Returns:
        None if it ended well, else the reason in one line.
    """
    command = [sys.executable, "-m", "decoupled_pp", *map(str, arguments)]
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return failure_in(log, code) if code else None


def failure_in(log: Path, code: int) -> str:
    """Returns the first thing that `dpp` said in a log, else the log's last line.

    The first, because `dpp` says last how to go on.
    """
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    said = [line.removeprefix("dpp: ") for line in lines if line.startswith("dpp: ")]
    reason = (said[:1] or lines[-1:] or ["no output"])[0]
    return f"{reason} (exit code {code}, {log})"


def say(text: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(text, flush=True)  # noqa: T201


def describe_scores(final: FinalScores) -> str:
    """Returns the last held-out scores of a run in words."""
    loss = "not finite" if final.val_loss is None else f"{final.val_loss:.4f}"
    text = f"held-out loss {loss}"
    if final.val_accuracy is None:
        return text
    return f"{text}, accuracy {100 * final.val_accuracy:.2f} %"
