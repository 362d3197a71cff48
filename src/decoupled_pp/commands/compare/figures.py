"""What the runs of a comparison say in numbers: per run, and per contender as median with the spread."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.core.reports import Record
from decoupled_pp.pipeline.meter import BUSY, PAUSES

TARGET_TOLERANCE = 1e-3
"""Share of the target by which a loss may be above it and still count as having reached it."""

REFERENCES = ("1f1b", "backprop")
"""Whom the speed of every contender is set against."""


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repeats."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread | None:
        """Of the values that there are; None if there are none."""
        known = [value for value in values if value is not None]
        return Spread(statistics.median(known), min(known), max(known)) if known else None


def run_figures(run: Run) -> dict[str, float | None]:
    """The numbers of one run; times in seconds, sizes in bytes.

    Throughput and periods are of the steady state (`Report.step_seconds`). Share of ideal and bubble come from the
    spans of the middle of the run: a rank computes while it is in any phase but the waits. The ideal is the busiest
    rank's own compute, back to back; the bubble is the mean idle share of all ranks.
    """
    summary, steps = run.summary, run.summary["steps"]
    samples = run.validations[-1]["samples"]
    period: dict[str, float | None] = summary["step_seconds"] or dict.fromkeys(("mean", "p50", "p95"))
    mean = period["mean"]
    busy = list(busy_shares(run).values())
    final = summary["final"]
    return {
        "samples_per_second": samples / steps / mean if mean else None,
        "samples_per_update": samples / steps,
        "step_p50": period["p50"],
        "step_p95": period["p95"],
        "share_of_ideal": max(busy) if busy else None,
        "bubble": 1 - statistics.mean(busy) if busy else None,
        "critic_ratio": critic_ratio(summary),
        "activation_bytes": max(row["saved_activation_bytes_peak"] or 0 for row in summary["per_stage"]),
        "memory_bytes": max(row["memory_bytes_peak"] for row in summary["per_stage"]),
        "training_seconds": summary["training_seconds"],
        "val_loss": loss_of(final["val_loss"]),
        "val_accuracy": final["val_accuracy"],
    }


def busy_shares(run: Run) -> dict[int, float]:
    """Rank -> share of the training time it computes, between the first and last update of the rank with most.

    Evaluations and checkpoints are no training time.
    """
    ends = max(
        ([start + took for phase, start, took, _ in spans if phase == "step"] for spans in run.spans.values()),
        key=len,
        default=[],
    )
    if len(ends) < 2:
        return {}
    first, last = ends[0], ends[-1]
    found = {}
    for rank, spans in run.spans.items():
        within: dict[str, float] = defaultdict(float)
        for phase, start, took, _ in spans:
            within[phase] += max(0.0, min(start + took, last) - max(start, first))
        found[rank] = sum(within[phase] for phase in BUSY) / (last - first - sum(within[phase] for phase in PAUSES))
    return found


def critic_ratio(summary: Record) -> float | None:
    """C / (F + B) of the stage where it is largest: critic time over forward and backward; None without critics."""
    ratios = [
        row["phase_seconds"]["critic"] / (row["phase_seconds"]["forward"] + row["phase_seconds"]["backward"])
        for row in summary["per_stage"]
        if row["critic_parameters"]
    ]
    return max(ratios, default=None)


def textbook_bubble(strategy: str, ranks: int, micro_batches: int) -> float | None:
    """Idle share of a step by the textbook, with equal stages, B = 2 F, W = F and free links.

    GPipe, 1F1B: (p-1) / (m + p-1). Interleaved, v = 2 stages a rank: (p-1) / (v m + p-1) (Megatron-LM, 2104.04473).
    Zero-bubble (interleaved): (p-1)(F + B - 2W) = (p-1) F idle a step, on half-size stages; ZBV: 0 (2401.10241).
    """
    p, m = ranks, micro_batches
    return {
        "decoupled": 0.0,
        "backprop": 0.0,
        "gpipe": (p - 1) / (m + p - 1),
        "1f1b": (p - 1) / (m + p - 1),
        "deepspeed": (p - 1) / (m + p - 1),
        "interleaved_1f1b": (p - 1) / (2 * m + p - 1),
        "zero_bubble": (p - 1) / (6 * m + p - 1),
        "zbv": 0.0,
    }.get(strategy)


def expected_speed_up(critic: float, ranks: int, micro_batches: int) -> float:
    """Decoupled over 1F1B at equal updates, equal stages, free links: (1 + (p-1)/m) / (1 + C/(F+B))."""
    return (1 + (ranks - 1) / micro_batches) / (1 + critic)


def targets(runs: Sequence[Run]) -> dict[int, float]:
    """Repeat -> the least final held-out loss of a pipeline trained by backpropagation (else of any baseline)."""
    rivals = [run for run in runs if run.contender.strategy != "decoupled"]
    pipelined = [run for run in rivals if run.contender.strategy not in {"backprop", "data_parallel"}]
    found: dict[int, float] = {}
    for run in pipelined or rivals:
        loss = loss_of(run.summary["final"]["val_loss"])
        if loss < found.get(run.repeat, math.inf):
            found[run.repeat] = loss
    return found


def loss_of(recorded: float | None) -> float:
    """A recorded loss; one that was not finite (None in JSON) is infinite: worse than all others, and no target."""
    return math.inf if recorded is None else recorded


def seconds_to(run: Run, target: float) -> float | None:
    """Training seconds at the first evaluation that reached the target; None if none did.

    Sums in another order do not decide: pipelines that compute the same end a few millionths apart.
    """
    reached = target + TARGET_TOLERANCE * abs(target)
    times = (record["training_seconds"] for record in run.validations if loss_of(record["loss"]) <= reached)
    return next(times, None)


def traffic(run: Run) -> list[Record]:
    """Bytes per training sample over every link, forward and backward."""
    samples = run.validations[-1]["samples"]
    return [
        {
            "from": link["from"],
            "to": link["to"],
            "forward": link["training_bytes_forward"] / samples,
            "backward": link["payload_bytes_backward"] / samples,
        }
        for link in run.summary["links"]
    ]


def summarize(contender: Contender, runs: Sequence[Run], micro_batches: int, ranks: int) -> dict[str, Any]:
    """One contender's numbers over its repeats; `runs` are those of all contenders."""
    own = [run for run in runs if run.contender.name == contender.name]
    per_run = [run_figures(run) for run in own]
    row: dict[str, Any] = {key: Spread.of(one[key] for one in per_run) for key in per_run[0]}
    for reference in REFERENCES:
        row[f"ratio_to_{reference}"] = Spread.of(_ratio(run, runs, reference) for run in own)
    goals = targets(runs)
    times = [seconds_to(run, goals[run.repeat]) for run in own if run.repeat in goals]
    row["seconds_to_target"] = Spread.of(times)
    row["reached_target"] = f"{sum(one is not None for one in times)} of {len(times)}"
    row["activation_bytes_by_rank"] = [stage["saved_activation_bytes_peak"] for stage in own[0].summary["per_stage"]]
    row["textbook_bubble"] = textbook_bubble(contender.strategy, ranks, micro_batches)
    row["traffic"] = traffic(own[0])
    return row


def _ratio(run: Run, runs: Sequence[Run], reference: str) -> float | None:
    """Throughput over that of the reference in the same repeat."""
    other = next((one for one in runs if one.contender.name == reference and one.repeat == run.repeat), None)
    mine = run_figures(run)["samples_per_second"]
    theirs = run_figures(other)["samples_per_second"] if other is not None else None
    return mine / theirs if mine and theirs else None
