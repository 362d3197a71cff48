"""Runs the contenders in turn, each in fresh processes, and reads what they leave in their run folders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled_pp.commands.child import describe_scores, run_dpp
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.core.reports import Report, Span, ValidationRecord
from decoupled_pp.run.folder import SUMMARY_FILE, TRACE_FILE, read_summary
from decoupled_pp.run.log import METRICS_FILE, read_records
from decoupled_pp.run.trace import read_trace


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        contender: The entry of the comparison that it is a run of.
        repeat: Number of the repeat, from 0; it is added to the seed.
        report: The figures in `summary.json`.
        validations: Held-out records of the network's own head, in order.
        spans: Rank -> spans of the middle of the run.
        summary: The content of `summary.json` as it is, for `compare.json`.
    """

    contender: Contender
    repeat: int
    report: Report
    validations: Sequence[ValidationRecord]
    spans: dict[int, list[Span]]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Training samples of the whole run."""
        return self.validations[-1].samples


@dataclass(frozen=True)
class Failure:
    """A contender that did not run, and why, in one line."""

    contender: Contender
    reason: str


def run_all(
    config: str,
    overrides: list[str],
    contenders: list[Contender],
    folder: Path,
    *,
    repeats: int,
    seed: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[list[Run], list[Failure]]:
    """Run all contenders in turn, `repeats` times (A B C A B C ...).

    One that fails is not tried again; the others go on.

    Args:
        config: The configuration file.
        overrides: The user's own `key=value` overrides.
        contenders: The entries of the comparison.
        folder: Where the run folders and logs go.
        repeats: How often each runs.
        seed: Seed of the first repeat; every further one adds 1, for all contenders alike.
        threads: CPU threads of every rank, for all contenders alike.
        say: Takes a line of progress.

    Returns:
        The runs that ended well, and the contenders that did not run.
    """
    runs: list[Run] = []
    failures: list[Failure] = []
    for repeat in range(repeats):
        for contender in contenders:
            if any(failure.contender is contender for failure in failures):
                continue
            name = f"{contender.name}-{repeat}"
            start = time.monotonic()
            own = [f"name={name}", f"runs={folder}", f"seed={seed + repeat}", f"threads={threads}"]
            settings = [f"--set={one}" for one in (*overrides, *contender.own, *contender.overrides, *own)]
            ranks = [f"--ranks={contender.ranks}"] if contender.ranks > 1 else []
            if reason := run_dpp(folder / f"{name}.log", "train", config, *settings, *ranks):
                failures.append(Failure(contender, reason))
                say(f"{contender.name}: not measured: {reason}")
                continue
            run = read_run(folder / name, contender, repeat)
            runs.append(run)
            speed = f"{run.report.samples_per_second:,.0f} samples/s"
            took = f"{time.monotonic() - start:.0f} s"
            say(f"{contender.name}, repeat {repeat + 1}: {speed}, {describe_scores(run.report.final)} ({took})")
    return runs, failures


def read_run(folder: Path, contender: Contender, repeat: int) -> Run:
    """Returns what a run left in its folder."""
    validations = [one for one in read_records(folder / METRICS_FILE) if isinstance(one, ValidationRecord)]
    last = max(record.stage for record in validations)
    return Run(
        contender,
        repeat,
        report=read_summary(folder),
        validations=[record for record in validations if record.stage == last],
        spans=read_trace(folder / TRACE_FILE),
        summary=json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")),
    )
