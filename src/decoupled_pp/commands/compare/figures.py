"""Reckons the numbers of a comparison: per run, and per contender as median with the spread of its repeats."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

from decoupled_pp.commands import depth
from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.commands.spread import Spread, loss_or_infinity
from decoupled_pp.core.records import JsonRecord
from decoupled_pp.core.reports import Span, StageSummary
from decoupled_pp.pipeline.meter import BUSY, PAUSES

_Value = TypeVar("_Value")

TARGET_TOLERANCE = 1e-3
"""Share of the target by which a loss may be above it and still count as having reached it."""


@dataclass(frozen=True, kw_only=True)
class Figures(JsonRecord, Generic[_Value]):
    """Numbers of one run, or spreads of them; times in seconds, sizes in bytes, None for what cannot be told."""

    samples_per_second: _Value  # in steady state (`Report.step_seconds`)
    samples_per_update: _Value
    step_p50: _Value  # median period of an update
    step_p95: _Value
    # Share of the time in which the busiest rank computes. The ideal is that rank's own compute, back to back.
    share_of_ideal: _Value
    bubble: _Value  # mean idle share of all ranks
    critic_ratio: _Value  # C / (F + B) of the stage where it is largest; None without critics
    activation_bytes: _Value  # saved activations of the worst rank
    memory_bytes: _Value  # peak of the worst rank
    training_seconds: _Value  # without evaluations and checkpoints
    val_loss: _Value  # final, held-out; infinite if it was not finite
    val_accuracy: _Value


def run_figures(run: Run) -> Figures[float | None]:
    """Returns the numbers of one run."""
    report = run.report
    period = report.step_seconds
    per_update = run.samples / report.steps
    busy = list(busy_shares(run).values())
    return Figures(
        samples_per_second=per_update / period.mean if period is not None else None,
        samples_per_update=per_update,
        step_p50=period.p50 if period is not None else None,
        step_p95=period.p95 if period is not None else None,
        share_of_ideal=max(busy) if busy else None,
        bubble=1 - statistics.mean(busy) if busy else None,
        critic_ratio=critic_ratio(report.per_stage),
        activation_bytes=max(stage.saved_activation_bytes_peak or 0 for stage in report.per_stage),
        memory_bytes=max(stage.memory_bytes_peak for stage in report.per_stage),
        training_seconds=report.training_seconds,
        val_loss=loss_or_infinity(report.final.val_loss),
        val_accuracy=report.final.val_accuracy,
    )


def busy_shares(run: Run) -> dict[int, float]:
    """Returns rank -> share of the training time it computes, between the first and last update of the rank with most.

    Evaluations and checkpoints are no training time.
    """
    # From update to update, so that whole periods are counted, whatever the recording cuts off at its ends.
    updates = [[span.end for span in spans if span.phase == "step"] for spans in run.spans.values()]
    ends = max(updates, key=len, default=[])
    if len(ends) < 2:
        return {}
    return {rank: _busy_share(spans, ends[0], ends[-1]) for rank, spans in run.spans.items()}


def _busy_share(spans: Sequence[Span], first: float, last: float) -> float:
    within: dict[str, float] = defaultdict(float)
    for span in spans:
        within[span.phase] += max(0.0, min(span.end, last) - max(span.start, first))
    training = last - first - sum(within[phase] for phase in PAUSES)
    return sum(within[phase] for phase in BUSY) / training


def critic_ratio(stages: Sequence[StageSummary]) -> float | None:
    """Returns C / (F + B) of the stage where it is largest: critic time over forward and backward."""
    ratios = [
        stage.phase_seconds["critic"] / (stage.phase_seconds["forward"] + stage.phase_seconds["backward"])
        for stage in stages
        if stage.critic_parameters
    ]
    return max(ratios, default=None)


def textbook_bubble(strategy: str, ranks: int, micro_batches: int) -> float | None:
    """Returns the idle share of a step by the textbook, with equal stages, B = 2 F, W = F and free links.

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
    """Returns decoupled over 1F1B at equal updates, equal stages, free links: (1 + (p-1)/m) / (1 + C/(F+B))."""
    return (1 + (ranks - 1) / micro_batches) / (1 + critic)


def targets(runs: Sequence[Run]) -> dict[int, float]:
    """Returns repeat -> least final held-out loss of a pipeline trained by backpropagation (else of any baseline)."""
    rivals = [run for run in runs if run.contender.strategy != "decoupled"]
    pipelined = [run for run in rivals if run.contender.strategy not in {"backprop", "data_parallel"}]
    found: dict[int, float] = {}
    for run in pipelined or rivals:
        loss = loss_or_infinity(run.report.final.val_loss)
        if loss < found.get(run.repeat, math.inf):
            found[run.repeat] = loss
    return found


def seconds_to(run: Run, target: float) -> float | None:
    """Returns the training seconds at the first evaluation that reached the target; None if none did."""
    # Pipelines that compute the same sums in another order end a few millionths apart: that must not decide.
    reached = target + TARGET_TOLERANCE * abs(target)
    times = (one.training_seconds for one in run.validations if loss_or_infinity(one.loss) <= reached)
    return next(times, None)


@dataclass(frozen=True, kw_only=True)
class LinkTraffic(JsonRecord):
    """Bytes per training sample over one link, with the activations and against them."""

    sender: int = field(metadata={"key": "from"})
    receiver: int = field(metadata={"key": "to"})
    forward: float
    backward: float


def traffic(run: Run) -> list[LinkTraffic]:
    """Returns the bytes per training sample over every link."""
    return [
        LinkTraffic(
            sender=link.sender,
            receiver=link.receiver,
            forward=link.training_bytes_forward / run.samples,
            backward=link.payload_bytes_backward / run.samples,
        )
        for link in run.report.links
    ]


@dataclass(frozen=True, kw_only=True)
class ContenderFigures(Figures[Spread | None]):
    """One contender's numbers over its repeats."""

    ratio_to_1f1b: Spread | None  # throughput over that of `1f1b` in the same repeat
    ratio_to_backprop: Spread | None
    seconds_to_target: Spread | None  # training seconds to the target of the repeat
    reached_target: str  # how many of the repeats with a target reached it, in words
    activation_bytes_by_rank: Sequence[int | None]  # in the first repeat
    textbook_bubble: float | None
    depth: depth.Depth | None  # beside the best baseline; None without exits or it
    traffic: Sequence[LinkTraffic]  # in the first repeat


def summarize(contender: Contender, runs: Sequence[Run], micro_batches: int, ranks: int) -> ContenderFigures:
    """Returns one contender's numbers over its repeats; `runs` are those of all contenders."""
    own = [run for run in runs if run.contender.name == contender.name]
    per_run = [run_figures(run) for run in own]
    spreads = {one.name: Spread.over(getattr(run, one.name) for run in per_run) for one in fields(Figures)}
    goals = targets(runs)
    speeds = {(run.contender.name, run.repeat): run_figures(run).samples_per_second for run in runs}
    times = [seconds_to(run, goals[run.repeat]) for run in own if run.repeat in goals]
    return ContenderFigures(
        **spreads,
        ratio_to_1f1b=Spread.over(_ratio(speeds, run, "1f1b") for run in own),
        ratio_to_backprop=Spread.over(_ratio(speeds, run, "backprop") for run in own),
        seconds_to_target=Spread.over(times),
        reached_target=f"{sum(one is not None for one in times)} of {len(times)}",
        activation_bytes_by_rank=[stage.saved_activation_bytes_peak for stage in own[0].report.per_stage],
        textbook_bubble=textbook_bubble(contender.strategy, ranks, micro_batches),
        depth=depth.measure(_beside_plain(own, runs)),
        traffic=traffic(own[0]),
    )


def _ratio(speeds: Mapping[tuple[str, int], float | None], run: Run, reference: str) -> float | None:
    """Returns the throughput over that of the reference in the same repeat."""
    mine = speeds[run.contender.name, run.repeat]
    theirs = speeds.get((reference, run.repeat))
    return mine / theirs if mine and theirs else None


def _beside_plain(own: Sequence[Run], runs: Sequence[Run]) -> list[depth.Pair]:
    """Returns a contender's runs beside those of the best baseline: all of them train by plain backpropagation."""
    baselines: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.contender.strategy != "decoupled":
            baselines[run.contender.name].append(run)
    best = max(baselines.values(), key=lambda found: depth.goodness([run.report.final for run in found]), default=[])
    plain = {run.repeat: run.report.final for run in best}
    return [depth.Pair(run.report.exits, plain[run.repeat]) for run in own if run.repeat in plain]
