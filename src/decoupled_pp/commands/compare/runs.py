"""Runs the contenders in turn, each in fresh processes, and reads what they leave in their run folders."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.core.reports import Record
from decoupled_pp.run.folder import SUMMARY_FILE, failure_in
from decoupled_pp.run.log import METRICS_FILE, read_records
from decoupled_pp.run.trace import read_trace


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        contender: Whose.
        repeat: Which repeat, from 0; its number is added to the seed.
        summary: The content of `summary.json`.
        validations: Held-out records of the network's own head, in order.
        spans: Rank -> spans of the middle of the run.
    """

    contender: Contender
    repeat: int
    summary: Record
    validations: list[Record]
    spans: dict[int, list[tuple[str, float, float, int]]]


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
    """All contenders in turn, `repeats` times (A B C A B C ...). One that fails is not tried again; the others go on.

    Args:
        config: The configuration file.
        overrides: The user's own `key=value` overrides.
        contenders: Who.
        folder: Where the run folders and logs go.
        repeats: How often.
        seed: Of the first repeat; every further one adds 1, for all contenders alike.
        threads: CPU threads of every rank, for all contenders alike.
        say: Takes a line of progress.
    """
    runs: list[Run] = []
    failures: list[Failure] = []
    for repeat in range(repeats):
        for contender in contenders:
            if any(failure.contender is contender for failure in failures):
                continue
            name, start = f"{contender.name}-{repeat}", time.monotonic()
            own = [f"name={name}", f"runs={folder}", f"seed={seed + repeat}", f"threads={threads}"]
            log = folder / f"{name}.log"
            code = _run(config, [*overrides, *contender.own, *contender.overrides, *own], contender.ranks, log)
            if code:
                failures.append(Failure(contender, failure_in(log, code)))
                say(f"{contender.name}: not measured: {failures[-1].reason}")
                continue
            runs.append(read_run(folder / name, contender, repeat))
            final, speed = runs[-1].summary["final"], runs[-1].summary["samples_per_second"]
            took = f"{time.monotonic() - start:.0f} s"
            say(f"{contender.name}, repeat {repeat + 1}: {speed:,.0f} samples/s, {_scores(final)} ({took})")
    return runs, failures


def read_run(folder: Path, contender: Contender, repeat: int) -> Run:
    """What a run left in its folder."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    records = [record for record in read_records(folder / METRICS_FILE) if record["kind"] == "validation"]
    last = max(record["stage"] for record in records)
    own_head = [record for record in records if record["stage"] == last]
    return Run(contender, repeat, summary, own_head, read_trace(folder / "trace.json"))


def _run(config: str, overrides: list[str], ranks: int, log: Path) -> int:
    command = [sys.executable, "-m", "decoupled_pp", "train", config, *(f"--set={one}" for one in overrides)]
    if ranks > 1:
        command += ["--ranks", str(ranks)]
    with log.open("w", encoding="utf-8") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def _scores(final: dict[str, Any]) -> str:
    text = "held-out loss not finite" if final["val_loss"] is None else f"held-out loss {final['val_loss']:.4f}"
    return text if final["val_accuracy"] is None else text + f", accuracy {100 * final['val_accuracy']:.2f} %"
