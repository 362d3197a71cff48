"""Runs the trials of a sweep, each in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from decoupled_pp.commands.child import Trial, describe_scores, say
from decoupled_pp.core.reports import Exit, Report
from decoupled_pp.run.folder import SUMMARY_FILE, read_summary


@dataclass(frozen=True)
class Outcome:
    """The end of a trial: scores, or a failure."""

    trial: Trial
    report: Report | None  # None if it failed
    failure: str | None = None  # in one line
    also: Mapping[str, Exit] = field(default_factory=dict)  # other held-out data -> score of the network's own head


def run_trials(trials: Sequence[Trial], also: Mapping[str, Sequence[str]], *, jobs: int, resume: bool) -> list[Outcome]:
    """Does the runs, `jobs` at a time, in their order; a run that fails does not stop the others.

    Each is then scored on other held-out data: `also` is a name -> the settings of some.
    """
    # Threads are enough: each only waits for its child process.
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda trial: _run(trial, also, resume), trials))


def _run(trial: Trial, also: Mapping[str, Sequence[str]], resume: bool) -> Outcome:
    """Trains and scores, except what a resumed sweep has done already."""
    start = time.monotonic()
    done = resume and (trial.run / SUMMARY_FILE).is_file()
    if not done and (failure := trial.train()):
        say(f"{trial.name}: failed: {failure}")
        return Outcome(trial, None, failure)
    scored = {}
    for name, overrides in also.items():
        scores = trial.run / f"also-{name}.json"
        done = resume and scores.is_file()
        if not done and (failure := trial.evaluate(overrides, scores)):
            say(f"{trial.name}: failed: {failure}")
            return Outcome(trial, None, f"evaluation on {name}: {failure}")
        scored[name] = Exit.from_json(json.loads(scores.read_text(encoding="utf-8"))["exits"][-1])
    report = read_summary(trial.run)
    say(f"{trial.name}: {describe_scores(report.final)} ({time.monotonic() - start:.0f} s)")
    return Outcome(trial, report, also=scored)
