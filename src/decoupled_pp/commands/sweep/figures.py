"""Reckons the numbers of a sweep: per variant the median with the spread over seeds, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from decoupled_pp.commands.spread import Column, Spread, loss_or_infinity
from decoupled_pp.commands.sweep.runs import Outcome
from decoupled_pp.core.records import JsonRecord
from decoupled_pp.core.reports import Exit, Report, StageSummary
from decoupled_pp.pipeline.meter import BUSY


@dataclass(frozen=True)
class SeedSpread(Spread):
    """A spread over seeds; `sweep.json` calls its ends `min` and `max`."""

    low: float = field(metadata={"key": "min"})
    high: float = field(metadata={"key": "max"})


@dataclass(frozen=True)
class OtherDataFigures(JsonRecord):
    """A variant's loss on other held-out data, and its difference to the reference's in percent."""

    loss: SeedSpread | None
    loss_change: SeedSpread | None


@dataclass(frozen=True, kw_only=True)
class VariantFigures(JsonRecord):
    """A variant's numbers over the seeds that ended well; all of the network's own head."""

    seeds: int  # how many ended well
    loss: SeedSpread | None  # held-out
    accuracy: SeedSpread | None  # in percent; None without class targets
    loss_change: SeedSpread | None  # difference to the reference's run with the same seed, in percent
    accuracy_change: SeedSpread | None  # in points
    exits: list[str]  # median score of every exit: accuracy in percent, else the loss
    also: Mapping[str, OtherDataFigures]  # name of other held-out data -> the loss on them
    critic_share: float  # of the compute time of the stage where it is largest
    critic_parameters: int  # of all critics
    training_seconds: SeedSpread | None


@dataclass(frozen=True)
class SweepFigures(JsonRecord):
    """The content of `sweep.json`."""

    reference: str
    variants: Mapping[str, VariantFigures]  # those with a run that ended well
    runs: Sequence[Mapping[str, Any]]  # the trial and the end of every run


class _Ended(NamedTuple):
    """A run that ended well."""

    seed: int
    report: Report
    also: Mapping[str, Exit]


def figures(outcomes: Sequence[Outcome], reference: str) -> SweepFigures:
    """Returns the numbers of every variant, and the raw scores of every run."""
    variants: dict[str, list[_Ended]] = {one.trial.entry: [] for one in outcomes}
    for one in outcomes:
        if one.report is not None:
            variants[one.trial.entry].append(_Ended(one.trial.seed, one.report, one.also))
    references = {run.seed: run for run in variants.get(reference, [])}
    rows = {name: _variant_figures(own, references) for name, own in variants.items() if own}
    return SweepFigures(reference, rows, [_raw(one) for one in outcomes])


def _variant_figures(runs: Sequence[_Ended], references: Mapping[int, _Ended]) -> VariantFigures:
    """Returns the numbers of a variant's runs, given the reference's runs by seed."""
    # A seed that the reference lacks has no difference: runs of unlike seeds differ by chance, too.
    pairs = [(run, references[run.seed]) for run in runs if run.seed in references]
    reports = [run.report for run in runs]
    return VariantFigures(
        seeds=len(runs),
        loss=SeedSpread.over(map(_loss, runs)),
        accuracy=SeedSpread.over(map(_accuracy, runs)),
        loss_change=_differences(pairs, _loss, _percent),
        accuracy_change=_differences(pairs, _accuracy, lambda mine, theirs: mine - theirs),
        exits=[_exit_score(exits) for exits in zip(*(report.exits for report in reports), strict=True)],
        also={name: _other_data(runs, pairs, name) for name in runs[0].also},
        critic_share=max(critic_share(stage) for report in reports for stage in report.per_stage),
        critic_parameters=sum(stage.critic_parameters for stage in reports[0].per_stage),
        training_seconds=SeedSpread.over(report.training_seconds for report in reports),
    )


def _other_data(runs: Sequence[_Ended], pairs: Sequence[tuple[_Ended, _Ended]], name: str) -> OtherDataFigures:
    def loss(run: _Ended) -> float | None:
        return run.also[name].val_loss

    return OtherDataFigures(SeedSpread.over(map(loss, runs)), _differences(pairs, loss, _percent))


def critic_share(stage: StageSummary) -> float:
    """Returns the critic's share of the time in which a stage computes: its passes, and its part of the update.

    The optimizer step is divided by parameters, which is right for optimizers that treat all alike.
    """
    if not stage.critic_time_fraction:  # no critic: the phase is the loss of the network itself
        return 0.0
    seconds = stage.phase_seconds
    parameters = stage.critic_parameters + stage.parameters
    step = seconds["step"] * stage.critic_parameters / max(1, parameters)
    return (seconds["critic"] + step) / sum(seconds[phase] for phase in BUSY)


def _loss(run: _Ended) -> float:
    return loss_or_infinity(run.report.final.val_loss)


def _accuracy(run: _Ended) -> float | None:
    accuracy = run.report.final.val_accuracy
    return None if accuracy is None else 100 * accuracy


def _percent(mine: float, theirs: float) -> float:
    return 100 * (mine / theirs - 1)


def _differences(
    pairs: Sequence[tuple[_Ended, _Ended]],
    score: Callable[[_Ended], float | None],
    difference: Callable[[float, float], float],
) -> SeedSpread | None:
    """Returns the spread of the differences between the scores of pairs of runs."""
    scores = [(score(mine), score(theirs)) for mine, theirs in pairs]
    return SeedSpread.over(
        difference(mine, theirs) for mine, theirs in scores if mine is not None and theirs is not None
    )


def _exit_score(exits: Sequence[Exit]) -> str:
    """Returns the median score of one exit over the seeds: accuracy in percent, else the loss."""
    accuracies = [100 * one.val_accuracy for one in exits if one.val_accuracy is not None]
    if accuracies:
        return f"{statistics.median(accuracies):.2f}"
    losses = [one.val_loss for one in exits if one.val_loss is not None]
    return f"{statistics.median(losses):.4f}" if losses else "-"


def _raw(outcome: Outcome) -> dict[str, Any]:
    """Returns what a run was and how it ended."""
    trial = outcome.trial
    raw: dict[str, Any] = {
        "variant": trial.entry,
        "seed": trial.seed,
        "overrides": trial.overrides,
        "failure": outcome.failure,
    }
    if outcome.report is not None:
        raw |= {"exits": outcome.report.exits, "final": outcome.report.final}
    if outcome.also:
        raw["also"] = outcome.also
    return raw


def table(found: SweepFigures, outcomes: Sequence[Outcome], title: str) -> str:
    """Returns the numbers as a Markdown table; failures below it."""
    columns = _columns(found)
    titles = ["variant", *(column.title for column in columns)]
    lines = [f"# {title}", "", "Medians (least .. greatest) over the seeds; differences are taken seed by seed.", ""]
    lines += [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, row in found.variants.items():
        cells = [name]
        for column in columns:
            value, span = column.cell(row)
            cells.append(f"{value} ({span})" if span else value)
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"- {one.trial.name} failed: {one.failure}" for one in outcomes if one.failure]
    if failed:
        lines += ["", *failed]
    return "\n".join([*lines, ""])


def _columns(found: SweepFigures) -> list[Column]:
    against = f"against {found.reference}"
    columns = [
        Column("seeds", lambda row: row.seeds),
        Column("held-out loss", lambda row: row.loss, ".4f"),
        Column("accuracy, %", lambda row: row.accuracy, ".2f"),
        Column(f"loss {against}, %", lambda row: row.loss_change, "+.2f"),
    ]
    for name in next((row.also for row in found.variants.values()), {}):
        columns += _other_columns(name, against)
    return [
        *columns,
        Column(f"accuracy {against}", lambda row: row.accuracy_change, "+.2f"),
        Column("by exit", lambda row: " / ".join(row.exits)),
        Column("critic's share of time", lambda row: row.critic_share, ".2f"),
        Column("critic parameters", lambda row: row.critic_parameters, ","),
        Column("seconds", lambda row: row.training_seconds, ".0f"),
    ]


def _other_columns(name: str, against: str) -> list[Column]:
    return [
        Column(f"loss on {name}", lambda row: row.also[name].loss, ".4f"),
        Column(f"{against}, %", lambda row: row.also[name].loss_change, "+.2f"),
    ]
