"""Tunes every variant of a sweep by one rule: the same values on the first seed, and the best held-out score wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from decoupled_pp.commands.child import Trial
from decoupled_pp.commands.depth import goodness
from decoupled_pp.commands.sweep.runs import Outcome, run_trials


@dataclass(frozen=True)
class Tuning:
    """Holds the trials of a tuning, and each variant's best choice."""

    outcomes: Sequence[Outcome] = ()  # of all trials
    best: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # variant -> setting -> value


NOT_TUNED = Tuning()


def run_tuned(
    trials: Mapping[tuple[str, int], Sequence[Trial]],
    choices: Sequence[Mapping[str, Any]],
    also: Mapping[str, Sequence[str]],
    *,
    jobs: int,
    resume: bool,
) -> tuple[list[Outcome], Tuning]:
    """Runs every variant with every choice on the first seed, and with its best choice on the others.

    Args:
        trials: (variant, number of a choice) -> its trials by seed.
        choices: By number, setting -> value.
        also: Name -> the settings of other held-out data that every run is scored on.
        jobs: Runs at a time.
        resume: True keeps the runs that are finished.

    Returns:
        The outcomes with each variant's best choice, seed by seed, and how it was found.
    """
    run = partial(run_trials, also=also, jobs=jobs, resume=resume)
    first = dict(zip(trials, run([own[0] for own in trials.values()]), strict=True))
    best = _best(first)
    later = [trial for by_seed in zip(*(trials[key][1:] for key in best), strict=True) for trial in by_seed]
    outcomes = [*(first[key] for key in best), *run(later)]
    return outcomes, Tuning(tuple(first.values()), {name: choices[number] for name, number in best})


def _best(outcomes: Mapping[tuple[str, int], Outcome]) -> list[tuple[str, int]]:
    """Returns every variant with its best choice, by score: a run that failed is worse than all others."""
    found: dict[str, tuple[str, int]] = {}
    for key in outcomes:
        found.setdefault(key[0], key)
        found[key[0]] = max(found[key[0]], key, key=lambda one: _score(outcomes[one]))
    return list(found.values())


def _score(outcome: Outcome) -> tuple[float, float]:
    return (-math.inf, -math.inf) if outcome.report is None else goodness([outcome.report.final])
