"""Runs the trials of a sweep, each in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from decoupled_pp.commands.child import describe_scores, run_dpp
from decoupled_pp.core.reports import Exit, Report
from decoupled_pp.run.folder import SUMMARY_FILE, read_summary


@dataclass(frozen=True)
class Trial:
    """One run to do.

    Attributes:
        variant: Name of the variant.
        seed: Seed of the run.
        config: The configuration file.
        overrides: Settings in which it differs from the configuration, as `key=value`.
        folder: Where run folders and logs go.
        threads: CPU threads of the run.
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
        """Name of its run folder."""
        return f"{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """The end of a trial: scores, or a failure.

    Attributes:
        trial: The trial.
        report: The report of its run; None if it failed.
        failure: Why it failed, in one line.
        also: Name of other held-out data -> score of the network's own head on them.
    """

    trial: Trial
    report: Report | None
    failure: str | None = None
    also: Mapping[str, Exit] = field(default_factory=dict)


def run_trials(trials: Sequence[Trial], *, jobs: int, resume: bool, say: Callable[[str], None]) -> list[Outcome]:
    """Do the runs, `jobs` at a time, in their order; a run that fails does not stop the others."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda trial: _run(trial, resume, say), trials))


def _run(trial: Trial, resume: bool, say: Callable[[str], None]) -> Outcome:
    run = trial.folder / trial.name
    start = time.monotonic()
    if failure := _train(trial, run, resume):
        say(f"{trial.name}: failed: {failure}")
        return Outcome(trial, None, failure)
    also = {}
    for name, overrides in trial.also.items():
        scores = run / f"also-{name}.json"
        if failure := _evaluate(trial, run, scores, overrides, resume):
            say(f"{trial.name}: failed: {failure}")
            return Outcome(trial, None, f"evaluation on {name}: {failure}")
        also[name] = Exit.from_json(json.loads(scores.read_text(encoding="utf-8"))["exits"][-1])
    report = read_summary(run)
    say(f"{trial.name}: {describe_scores(report.final)} ({time.monotonic() - start:.0f} s)")
    return Outcome(trial, report, also=also)


def _train(trial: Trial, run: Path, resume: bool) -> str | None:
    """Train, unless a resumed sweep has done so; returns the reason of a failure."""
    if resume and (run / SUMMARY_FILE).is_file():
        return None
    own = [f"name={trial.name}", f"runs={trial.folder}", f"seed={trial.seed}", f"threads={trial.threads}"]
    settings = [*trial.overrides, "logging.tensorboard=false", "sample=null", *own]
    return run_dpp(_log(trial), "train", trial.config, "--overwrite", *(f"--set={one}" for one in settings))


def _evaluate(trial: Trial, run: Path, scores: Path, overrides: Sequence[str], resume: bool) -> str | None:
    """Score the finished run on other data, unless a resumed sweep has done so; returns the reason of a failure."""
    if resume and scores.is_file():
        return None
    settings = [*overrides, f"threads={trial.threads}"]
    return run_dpp(_log(trial), "evaluate", run, f"--json={scores}", *(f"--set={one}" for one in settings))


def _log(trial: Trial) -> Path:
    return trial.folder / f"{trial.name}.log"
