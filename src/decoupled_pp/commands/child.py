"""Runs `dpp` in child processes with their output in logs, for commands that start many runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import FinalScores

if TYPE_CHECKING:
    from decoupled_pp.settings.run import Settings


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run to do, in processes of its own."""

    entry: str  # the contender or variant that it is a run of
    name: str  # of its run folder, and of the log beside it
    folder: Path  # where both lie
    config: str
    overrides: Sequence[str]  # `key=value`
    seed: int
    threads: int  # of every rank
    ranks: int = 1

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / self.name

    def train(self) -> str | None:
        """Trains; returns None if it ended well, else the reason in one line."""
        own = [f"name={self.name}", f"runs={self.folder}", f"seed={self.seed}", f"threads={self.threads}"]
        settings = [*self.overrides, "logging.tensorboard=false", "sample=null", *own]
        ranks = [f"--ranks={self.ranks}"] if self.ranks > 1 else []
        return self._dpp("train", self.config, "--overwrite", *ranks, settings=settings)

    def evaluate(self, overrides: Sequence[str], scores: Path) -> str | None:
        """Scores the finished run into a JSON file; returns as `train` does."""
        settings = [*overrides, f"threads={self.threads}"]
        return self._dpp("evaluate", self.run, f"--json={scores}", settings=settings)

    def _dpp(self, *arguments: str | Path, settings: Sequence[str]) -> str | None:
        command = [sys.executable, "-m", "decoupled_pp", *map(str, arguments), *(f"--set={one}" for one in settings)]
        log = self.folder / f"{self.name}.log"
        # A fresh process for every run: no thread count, random state, cache or peak memory comes from the run before.
        with log.open("a", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        return failure_in(log, code) if code else None


def check_entry(name: str, settings: Settings) -> None:
    """Raises UsageError, before anything is written, for settings or data with which a run would be refused."""
    from decoupled_pp.training.job import check_run  # imports torch

    say(f"checking {name}")
    try:
        check_run(settings.model_copy(update={"sample": None}))  # as `Trial` trains it
    except UsageError as error:
        raise UsageError(f"{name}: {error.text}", code=error.code, key=error.key) from error


def failure_in(log: Path, code: int) -> str:
    """Returns the first thing that `dpp` said in a log, else the log's last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    said = [line.removeprefix("dpp: ") for line in lines if line.startswith("dpp: ")]
    # The first, because `dpp` says last how to go on.
    reason = (said[:1] or lines[-1:] or ["no output"])[0]
    return f"{reason} (exit code {code}, {log})"


def say(text: str) -> None:
    """Prints a line of progress at once, also into a pipe."""
    print(text, flush=True)  # noqa: T201


def describe_scores(final: FinalScores) -> str:
    """Returns the last held-out scores of a run in words."""
    loss = "not finite" if final.val_loss is None else f"{final.val_loss:.4f}"
    accuracy = "" if final.val_accuracy is None else f", accuracy {100 * final.val_accuracy:.2f} %"
    return f"held-out loss {loss}{accuracy}"
