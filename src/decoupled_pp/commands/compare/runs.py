"""Runs the contenders in turn, each in fresh processes, and reads what they leave in their run folders."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoupled_pp.commands.child import Trial, describe_scores, say
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.core.reports import Report, Span, ValidationRecord
from decoupled_pp.run.folder import SUMMARY_FILE, TRACE_FILE, read_summary
from decoupled_pp.run.log import METRICS_FILE, read_records
from decoupled_pp.run.trace import read_trace


@dataclass(frozen=True)
class Run:
    """One finished run."""

    contender: Contender
    repeat: int  # from 0; it is added to the seed
    report: Report
    validations: Sequence[ValidationRecord]  # of the network's own head, in order
    spans: dict[int, list[Span]]  # rank -> spans of the middle of the run
    summary: dict[str, Any] = field(default_factory=dict)  # `summary.json` as it is, for `compare.json`

    @property
    def samples(self) -> int:
        """Training samples of the whole run."""
        return self.validations[-1].samples


def run_all(
    contenders: Sequence[Contender],
    folder: Path,
    config: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    *,
    threads: int,
) -> tuple[list[Run], dict[str, str]]:
    """Runs all contenders in turn, once for each seed; returns the runs that ended well, and the reasons of the others.

    A contender that fails is not tried again; the others go on.
    """
    runs: list[Run] = []
    failures: dict[str, str] = {}
    # A B C A B C, not A A B B C C: a machine that slows down meanwhile does so for all alike.
    for repeat, seed in enumerate(seeds):
        for contender in contenders:
            if contender.name in failures:
                continue
            start = time.monotonic()
            trial = Trial(
                entry=contender.name,
                name=f"{contender.name}-{repeat}",
                folder=folder,
                config=config,
                overrides=[*overrides, *contender.own, *contender.overrides],
                seed=seed,
                threads=threads,
                ranks=contender.ranks,
            )
            if reason := trial.train():
                failures[contender.name] = reason
                say(f"{contender.name}: not measured: {reason}")
                continue
            run = _read_run(trial.run, contender, repeat)
            runs.append(run)
            speed = f"{run.report.samples_per_second:,.0f} samples/s"
            took = f"{time.monotonic() - start:.0f} s"
            say(f"{contender.name}, repeat {repeat + 1}: {speed}, {describe_scores(run.report.final)} ({took})")
    return runs, failures


def _read_run(folder: Path, contender: Contender, repeat: int) -> Run:
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
