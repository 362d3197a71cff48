"""The runs of a sweep, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from decoupled_pp.contracts import Record
from decoupled_pp.run_folder import SUMMARY_FILE, failure_in


@dataclass(frozen=True)
class Trial:
    """One run to do.

    Attributes:
        variant: Whose.
        seed: Its seed.
        config: The configuration file.
        overrides: What it changes.
        folder: Where run folders and logs go.
        threads: CPU threads.
    """

    variant: str
    seed: int
    config: str
    overrides: Sequence[str]
    folder: Path
    threads: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a summary, or with a line that says why not."""

    trial: Trial
    summary: Record | None
    failure: str | None = None


def run_trials(trials: Sequence[Trial], *, jobs: int, resume: bool, say: Callable[[str], None]) -> list[Outcome]:
    """Do the runs, `jobs` at a time, in their order; a run that fails does not stop the others."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda trial: _run(trial, resume, say), trials))


def _run(trial: Trial, resume: bool, say: Callable[[str], None]) -> Outcome:
    done = trial.folder / trial.name / SUMMARY_FILE
    start = time.monotonic()
    if not (resume and done.is_file()):
        own = [f"name={trial.name}", f"runs={trial.folder}", f"seed={trial.seed}", f"threads={trial.threads}"]
        fixed = ["logging.tensorboard=false", "sample=null", *own]
        settings = [f"--set={one}" for one in (*trial.overrides, *fixed)]
        command = [sys.executable, "-m", "decoupled_pp", "train", trial.config, "--overwrite", *settings]
        log = trial.folder / f"{trial.name}.log"
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            outcome = Outcome(trial, None, failure_in(log, code))
            say(f"{trial.name}: failed: {outcome.failure}")
            return outcome
    summary: Record = json.loads(done.read_text(encoding="utf-8"))
    final = summary["final"]
    scores = [f"loss {final['val_loss']:.4f}" if final["val_loss"] is not None else "loss not finite"]
    if final["val_accuracy"] is not None:
        scores.append(f"accuracy {100 * final['val_accuracy']:.2f} %")
    say(f"{trial.name}: {', '.join(scores)} ({time.monotonic() - start:.0f} s)")
    return Outcome(trial, summary)
