"""Joins what every rank measured into one report, the same on every rank; baselines use it as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from decoupled_pp.core.channels import LinkCounters, LinkEnd
from decoupled_pp.core.device import peak_memory
from decoupled_pp.core.plans import count_parameters
from decoupled_pp.core.records import JsonRecord, tuple_of
from decoupled_pp.core.reports import Exit, FinalScores, LinkSummary, Report, StageSummary, StepSeconds
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class StageMeasurement(JsonRecord):
    """The figures of one stage at the end of a run, on the rank that trained it; most are those of `Report`."""

    summary: StageSummary = field(metadata={"read": StageSummary.from_json})
    steps: int
    seconds: float
    training_seconds: float
    step_seconds: StepSeconds | None = field(metadata={"read": StepSeconds.from_json})
    samples_per_second: float
    train_loss: float | None  # mean training loss over the last metrics interval; None if this rank knows no loss
    exit: Exit | None = field(metadata={"read": Exit.from_json})


@dataclass(frozen=True, kw_only=True)
class RankMeasurement(JsonRecord):
    """The part of the report that one process knows."""

    stages: tuple[StageMeasurement, ...] = field(metadata={"read": tuple_of(StageMeasurement.from_json)})
    links: tuple[LinkSummary, ...] = field(metadata={"read": tuple_of(LinkSummary.from_json)})
    stopped: str | None = None  # why the run ends early, as far as this process knows, or None


def measure_stage(stage: Stage, meter: StageMeter) -> StageMeasurement:
    """Returns the measurement of a decoupled stage."""
    loss, accuracy = meter.last_exit or (None, None)
    return measure(
        meter,
        index=stage.index,
        layers=[stage.trunk],
        critic=stage.critic,
        saved_activation_bytes_peak=stage.saved_activation_bytes_peak,
        device=stage.body.device,
        steps=stage.updates,
        exit=Exit(stage.index, loss, accuracy, meter.last_knn),
    )


def measure(
    meter: StageMeter,
    *,
    index: int,
    layers: Iterable[nn.Module],
    critic: nn.Module | None,
    saved_activation_bytes_peak: int | None,
    device: torch.device,
    steps: int,
    exit: Exit | None,
) -> StageMeasurement:
    """Returns the measurement of a stage of any strategy: what its meter counted, and what only its trainer knows."""
    phases = meter.phase_seconds()
    summary = StageSummary(
        stage=index,
        parameters=sum(count_parameters(part) for part in layers),
        critic_parameters=count_parameters(critic),
        saved_activation_bytes_peak=saved_activation_bytes_peak,
        memory_bytes_peak=peak_memory(device),
        # Without a critic the phase `critic` is the loss on the network's own head.
        critic_time_fraction=meter.critic_time_fraction() if critic is not None else 0.0,
        busy_fraction=meter.busy_fraction(),
        wait_in_seconds=phases["wait_in"],
        wait_out_seconds=phases["wait_out"],
        phase_seconds=phases,
    )
    return StageMeasurement(
        summary=summary,
        steps=steps,
        seconds=meter.seconds(),
        training_seconds=meter.training_seconds(),
        step_seconds=meter.step_seconds(),
        samples_per_second=meter.samples_per_second(),
        train_loss=meter.last_loss,
        exit=exit,
    )


def link_summaries(ends: Iterable[object]) -> tuple[LinkSummary, ...]:
    """Returns the counters of those of this process's inlets and outlets that are ends of links."""
    # In one process a link is its own two ends: `dict.fromkeys` keeps one of them.
    links = [end for end in dict.fromkeys(ends) if isinstance(end, LinkEnd)]
    return tuple(summarize_link(end.sender, end.sender + 1, end.counters) for end in links)


def summarize_link(sender: int, receiver: int, counters: LinkCounters) -> LinkSummary:
    """Returns what one end of a link counted."""
    return LinkSummary(sender=sender, receiver=receiver, **vars(counters))


def make_report(gathered: Sequence[Mapping[str, Any]]) -> Report:
    """Makes the report from the `RankMeasurement` of every process, in order of ranks, as `Control.gather` gives them.

    Times and training loss are those of the last stage with an exit, through which all samples have gone.
    """
    ranks = [RankMeasurement.from_json(content) for content in gathered]
    stages = sorted((stage for rank in ranks for stage in rank.stages), key=lambda stage: stage.summary.stage)
    exits = tuple(stage.exit for stage in stages if stage.exit is not None)
    last = [stage for stage in stages if stage.exit is not None][-1]
    return Report(
        steps=last.steps,
        seconds=last.seconds,
        training_seconds=last.training_seconds,
        step_seconds=last.step_seconds,
        samples_per_second=last.samples_per_second,
        final=FinalScores(last.train_loss, exits[-1].val_loss, exits[-1].val_accuracy),
        exits=exits,
        per_stage=tuple(stage.summary for stage in stages),
        links=_join_ends(end for rank in ranks for end in rank.links),
        stopped=ranks[0].stopped,
    )


def _join_ends(ends: Iterable[LinkSummary]) -> tuple[LinkSummary, ...]:
    """Returns one summary per link, in order of senders: each of its two ends counts what the other does not."""
    links: dict[tuple[int, int], LinkSummary] = {}
    for end in ends:
        key = (end.sender, end.receiver)
        other = links.get(key, summarize_link(*key, LinkCounters()))
        counters = {name: getattr(other, name) + getattr(end, name) for name in vars(LinkCounters())}
        links[key] = replace(end, **counters)
    return tuple(links[key] for key in sorted(links))
