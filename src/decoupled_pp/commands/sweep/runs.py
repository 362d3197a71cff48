"""The runs of a sweep, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from decoupled_pp.core.reports import Record
from decoupled_pp.run.folder import SUMMARY_FILE, failure_in


@dataclass(frozen=True)
class Trial:
    """One run to do.

    Attributes:
        variant: Whose.
        seed: Its seed.
        config: The configuration file.
        overrides: What it changes.
        folder: Where run folders and logs go.
        threads: CPU threads; the settings' own, if they name a number.
        also: Name -> settings of other held-out data that the finished run is scored on.
    """

    variant: str
    seed: int
    config: str
    overrides: Sequence[str]
    folder: Path
    threads: int
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a summary and its scores on other data by name, or with a line that says why not."""

    trial: Trial
    summary: Record | None
    failure: str | None = None
    also: Mapping[str, Record] = field(default_factory=dict)


def run_trials(trials: Sequence[Trial], *, jobs: int, resume: bool, say: Callable[[str], None]) -> list[Outcome]:
    """Do the runs, `jobs` at a time, in their order; a run that fails does not stop the others."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda trial: _run(trial, resume, say), trials))


def _run(trial: Trial, resume: bool, say: Callable[[str], None]) -> Outcome:
    run = trial.folder / trial.name
    done, log = run / SUMMARY_FILE, trial.folder / f"{trial.name}.log"
    start = time.monotonic()
    if not (resume and done.is_file()):
        own = [f"name={trial.name}", f"runs={trial.folder}", f"seed={trial.seed}", f"threads={trial.threads}"]
        fixed = ["logging.tensorboard=false", "sample=null", *own]
        settings = [f"--set={one}" for one in (*trial.overrides, *fixed)]
        if failure := _dpp(log, "train", trial.config, "--overwrite", *settings):
            say(f"{trial.name}: failed: {failure}")
            return Outcome(trial, None, failure)
    also = {}
    for name, overrides in trial.also.items():
        written = run / f"also-{name}.json"
        own = [f"--set={one}" for one in (*overrides, f"threads={trial.threads}")]
        if not (resume and written.is_file()) and (failure := _dpp(log, "evaluate", run, f"--json={written}", *own)):
            say(f"{trial.name}: failed: {failure}")
            return Outcome(trial, None, f"evaluation on {name}: {failure}")
        also[name] = json.loads(written.read_text(encoding="utf-8"))["exits"][-1]
    summary: Record = json.loads(done.read_text(encoding="utf-8"))
    final = summary["final"]
    scores = [f"loss {final['val_loss']:.4f}" if final["val_loss"] is not None else "loss not finite"]
    if final["val_accuracy"] is not None:
        scores.append(f"accuracy {100 * final['val_accuracy']:.2f} %")
    say(f"{trial.name}: {', '.join(scores)} ({time.monotonic() - start:.0f} s)")
    return Outcome(trial, summary, also=also)


def _dpp(log: Path, *arguments: str | Path) -> str | None:
    """Run a command with its output appended to a log; the reason if it fails."""
    with log.open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", "decoupled_pp", *map(str, arguments)]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return failure_in(log, code) if code else None
