"""Reckons the numbers of a sweep: per variant the median with the spread over seeds, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoupled_pp.commands.spread import Spread, loss_or_infinity
from decoupled_pp.commands.sweep.runs import Outcome
from decoupled_pp.core.records import JsonRecord
from decoupled_pp.core.reports import Exit, StageSummary
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
    """A variant's numbers over the seeds that ended well; all of the network's own head.

    Attributes:
        seeds: How many seeds ended well.
        loss: Held-out loss.
        accuracy: Held-out accuracy in percent; None without class targets.
        loss_change: Difference of the loss to the reference's run with the same seed, in percent.
        accuracy_change: Difference of the accuracy, in points.
        exits: Median score of every exit: accuracy in percent, else the loss.
        also: Name of other held-out data -> the loss on them.
        critic_share: Critic's share of the compute time of the stage where it is largest.
        critic_parameters: Parameters of all critics.
        training_seconds: Training time.
    """

    seeds: int
    loss: SeedSpread | None
    accuracy: SeedSpread | None
    loss_change: SeedSpread | None
    accuracy_change: SeedSpread | None
    exits: list[str]
    also: Mapping[str, OtherDataFigures]
    critic_share: float
    critic_parameters: int
    training_seconds: SeedSpread | None


@dataclass(frozen=True)
class SweepFigures(JsonRecord):
    """The content of `sweep.json`.

    Attributes:
        reference: The variant that all are set against.
        variants: Variant -> its numbers, of those with a run that ended well.
        runs: The trial and the end of every run.
    """

    reference: str
    variants: Mapping[str, VariantFigures]
    runs: Sequence[Mapping[str, Any]]


def figures(outcomes: Sequence[Outcome], reference: str) -> SweepFigures:
    """Returns the numbers of every variant, and the raw scores of every run."""
    variants: dict[str, list[Outcome]] = {one.trial.variant: [] for one in outcomes}
    for one in outcomes:
        if one.report is not None:
            variants[one.trial.variant].append(one)
    references = {one.trial.seed: one for one in variants.get(reference, [])}
    rows = {name: _variant_figures(own, references) for name, own in variants.items() if own}
    return SweepFigures(reference, rows, [_raw(one) for one in outcomes])


def _variant_figures(own: Sequence[Outcome], references: Mapping[int, Outcome]) -> VariantFigures:
    """Returns the numbers of a variant's runs, given the reference's runs by seed."""
    pairs = [(one, references.get(one.trial.seed)) for one in own]
    reports = [one.report for one in own if one.report is not None]
    also = {
        name: OtherDataFigures(
            SeedSpread.over(_loss_on(one, name) for one in own),
            SeedSpread.over(_percent_change(_loss_on(one, name), _loss_on(other, name)) for one, other in pairs),
        )
        for name in own[0].also
    }
    return VariantFigures(
        seeds=len(own),
        loss=SeedSpread.over(_loss(one) for one in own),
        accuracy=SeedSpread.over(_accuracy(one) for one in own),
        loss_change=SeedSpread.over(_percent_change(_loss(one), _loss(other)) for one, other in pairs),
        accuracy_change=SeedSpread.over(_difference(_accuracy(one), _accuracy(other)) for one, other in pairs),
        exits=[_exit_score(exits) for exits in zip(*(report.exits for report in reports), strict=True)],
        also=also,
        critic_share=max(critic_share(stage) for report in reports for stage in report.per_stage),
        critic_parameters=sum(stage.critic_parameters for stage in reports[0].per_stage),
        training_seconds=SeedSpread.over(report.training_seconds for report in reports),
    )


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


def _loss(outcome: Outcome | None) -> float | None:
    """Returns the loss of a run that ended well; infinite if it was not finite."""
    if outcome is None or outcome.report is None:
        return None
    return loss_or_infinity(outcome.report.final.val_loss)


def _accuracy(outcome: Outcome | None) -> float | None:
    """Returns the accuracy of a run that ended well, in percent; None without class targets."""
    if outcome is None or outcome.report is None or outcome.report.final.val_accuracy is None:
        return None
    return 100 * outcome.report.final.val_accuracy


def _loss_on(outcome: Outcome | None, name: str) -> float | None:
    return None if outcome is None else outcome.also[name].val_loss


def _percent_change(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else 100 * (mine / theirs - 1)


def _difference(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


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
        "variant": trial.variant,
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
    reference = found.reference
    others = next((list(row.also) for row in found.variants.values()), [])
    titles = ["variant", "seeds", "held-out loss", "accuracy, %", f"loss against {reference}, %"]
    for name in others:
        titles += [f"loss on {name}", f"against {reference}, %"]
    titles += [f"accuracy against {reference}", "by exit", "critic's share of time", "critic parameters", "seconds"]
    lines = [f"# {title}", "", "Medians (least .. greatest) over the seeds; differences are taken seed by seed.", ""]
    lines += [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    lines += [f"| {' | '.join(_cells(name, row))} |" for name, row in found.variants.items()]
    failed = [f"- {one.trial.name} failed: {one.failure}" for one in outcomes if one.failure]
    if failed:
        lines += ["", *failed]
    return "\n".join([*lines, ""])


def _cells(name: str, row: VariantFigures) -> list[str]:
    cells = [
        name,
        str(row.seeds),
        _shown(row.loss, ".4f"),
        _shown(row.accuracy, ".2f"),
        _shown(row.loss_change, "+.2f"),
    ]
    for other in row.also.values():
        cells += [_shown(other.loss, ".4f"), _shown(other.loss_change, "+.2f")]
    return [
        *cells,
        _shown(row.accuracy_change, "+.2f"),
        " / ".join(row.exits),
        f"{row.critic_share:.2f}",
        f"{row.critic_parameters:,}",
        _shown(row.training_seconds, ".0f"),
    ]


def _shown(spread: SeedSpread | None, form: str) -> str:
    if spread is None:
        return "-"
    middle, low, high = (format(value, form) for value in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low} .. {high})"
