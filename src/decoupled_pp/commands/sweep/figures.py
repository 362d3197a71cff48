"""Reckons the numbers of a sweep: per variant the median with the spread over seeds, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from decoupled_pp.commands.depth import Depth, Pair, goodness, measure
from decoupled_pp.commands.spread import Spread, loss_or_infinity
from decoupled_pp.commands.sweep.runs import Outcome
from decoupled_pp.commands.sweep.tuning import NOT_TUNED, Tuning
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
    depth: Depth | None  # against the best variant that trains the same network as a whole; None without exits or it
    plain: str | None  # name of that variant
    tuned: Mapping[str, Any]  # setting -> the value that was found best
    also: Mapping[str, OtherDataFigures]  # name of other held-out data -> the loss on them
    critic_share: float  # of the compute time of the stage where it is largest
    critic_parameters: int  # of all critics
    training_seconds: SeedSpread | None


@dataclass(frozen=True)
class SweepFigures(JsonRecord):
    """The content of `sweep.json`."""

    reference: str
    tune: Mapping[str, Sequence[Any]]  # setting -> the values that every variant was tried with
    variants: Mapping[str, VariantFigures]  # those with a run that ended well
    runs: Sequence[Mapping[str, Any]]  # the trial and the end of every run


class _Ended(NamedTuple):
    """A run that ended well."""

    seed: int
    report: Report
    also: Mapping[str, Exit]


def figures(
    outcomes: Sequence[Outcome],
    reference: str,
    tune: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    tuning: Tuning = NOT_TUNED,
) -> SweepFigures:
    """Returns the numbers of every variant, and the raw scores of every run, those that only tuned included."""
    variants: dict[str, list[_Ended]] = {one.trial.entry: [] for one in outcomes}
    for one in outcomes:
        if one.report is not None:
            variants[one.trial.entry].append(_Ended(one.trial.seed, one.report, one.also))
    ended = {name: own for name, own in variants.items() if own}
    rows = {name: _variant_figures(name, ended, reference, tuning.best.get(name, {})) for name in ended}
    others = [one for one in tuning.outcomes if one not in outcomes]
    return SweepFigures(reference, tune, rows, [_raw(one) for one in [*outcomes, *others]])


def _plain_of(runs: Sequence[_Ended], variants: Mapping[str, Sequence[_Ended]]) -> str | None:
    """Returns the name of the best variant that trains the network of some runs as a whole; None if none does."""
    rivals = {
        name: goodness([run.report.final for run in own])
        for name, own in variants.items()
        if len(own[0].report.exits) == 1 and _parameters(own[0]) == _parameters(runs[0])
    }
    return max(rivals, key=rivals.__getitem__, default=None)


def _parameters(run: _Ended) -> int:
    """Returns the trained parameters of a run's network, which tell one network from another."""
    return sum(stage.parameters for stage in run.report.per_stage)


def _pairs(runs: Sequence[_Ended], others: Sequence[_Ended]) -> list[tuple[_Ended, _Ended]]:
    """Returns the runs with those of the same seed: two of unlike seeds differ by chance, too."""
    by_seed = {run.seed: run for run in others}
    return [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]


def _variant_figures(
    name: str, variants: Mapping[str, Sequence[_Ended]], reference: str, tuned: Mapping[str, Any]
) -> VariantFigures:
    """Returns the numbers of a variant's runs, beside those of the reference and of plain backpropagation."""
    runs = variants[name]
    reports = [run.report for run in runs]
    pairs = _pairs(runs, variants.get(reference, []))
    plain = _plain_of(runs, variants)
    beside_plain = _pairs(runs, variants[plain] if plain else [])
    depth = measure([Pair(mine.report.exits, theirs.report.final) for mine, theirs in beside_plain])
    return VariantFigures(
        seeds=len(runs),
        loss=SeedSpread.over(map(_loss, runs)),
        accuracy=SeedSpread.over(map(_accuracy, runs)),
        loss_change=_differences(pairs, _loss, _percent),
        accuracy_change=_differences(pairs, _accuracy, lambda mine, theirs: mine - theirs),
        exits=[_exit_score(exits) for exits in zip(*(report.exits for report in reports), strict=True)],
        depth=depth,
        plain=plain if depth is not None else None,
        tuned=tuned,
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
