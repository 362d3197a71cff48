"""Makes the entries of a comparison: strategies with ranks, steps and updates, all on the same samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from decoupled_pp.core.errors import UsageError
from decoupled_pp.settings.run import STAGES_ALONE, Settings, Strategy

STRATEGIES: tuple[str, ...] = get_args(Strategy)
"""The strategies that can be compared."""

BOTH_UPDATES = {"decoupled": "decoupled_per_flush", "backprop": "backprop_per_micro_batch"}
"""Strategy that can update at either pace -> name of the second entry that the comparison adds for it."""

EVALUATIONS = 10
"""Held-out evaluations of a run whose settings name none."""

SHARED = (
    "name", "runs", "seed", "threads", "device", "training.precision", "model", "data", "validation", "loss",
    "start_from", "sample", "logging.tensorboard",
)  # fmt: skip
"""Settings, or sections of them, that no contender may have to itself: they make the entries comparable."""


@dataclass(frozen=True)
class Contender:
    """One entry of a comparison."""

    name: str  # in the report
    strategy: str
    ranks: int
    accumulate: int  # micro-batches per optimizer update
    steps: int  # optimizer updates
    overrides: tuple[str, ...]  # settings in which it differs from the configuration, as `key=value`
    own: tuple[str, ...] = ()  # settings that the user gave to it alone, as `key=value`


def contenders(settings: Settings, kinds: list[str], ranks: int, micro_batches: int) -> list[Contender]:
    """Returns the entries of a comparison, or raises UsageError if they cannot be compared.

    All see the same micro-batches. A pipelined baseline updates once per flush of `micro_batches`. A decoupled stage
    may update after every micro-batch, as configured. So `decoupled` appears twice: as configured, and with an update
    per flush. `backprop` appears twice too, for each pace has its plain reference.
    """
    _check(settings, kinds, ranks, micro_batches)
    own = settings.training.accumulate
    found = []
    for kind in kinds:
        pace, other_pace = (own, micro_batches) if kind == "decoupled" else (micro_batches, own)
        entry = partial(_contender, settings, kind, ranks=ranks, micro_batches=micro_batches)
        found.append(entry(kind, pace))
        if kind in BOTH_UPDATES and micro_batches != own:
            found.append(entry(BOTH_UPDATES[kind], other_pace))
    return found


def _check(settings: Settings, kinds: list[str], ranks: int, micro_batches: int) -> None:
    if len(set(kinds)) < len(kinds):
        raise UsageError(f"--strategies: {', '.join(kinds)} names one twice; name each once", code="strategy-twice")
    if ranks < 2:
        raise UsageError(
            f"--ranks {ranks} must be at least 2: a pipeline has several ranks (backprop always has one)",
            code="too-few-ranks",
        )
    own = settings.training.accumulate
    if micro_batches < 1 or micro_batches % own:
        raise UsageError(
            f"--micro-batches {micro_batches} must be a multiple of `training.accumulate`, {own}",
            code="uneven-flush",
            key="training.accumulate",
        )
    flushes = settings.training.steps * own // micro_batches
    if flushes < EVALUATIONS:
        packets = settings.training.steps * own
        raise UsageError(
            f"{packets} micro-batches (`training.steps` x `training.accumulate`) make {flushes} flushes of "
            f"{micro_batches}, too few to compare; set `training.steps` to at least "
            f"{EVALUATIONS * micro_batches // own}, or lower --micro-batches",
            code="too-few-flushes",
            key="training.steps",
        )


def with_own_settings(entries: Sequence[Contender], given: Sequence[tuple[str, str]]) -> list[Contender]:
    """Returns the entries, some with settings of their own: a learning rate that suits one pace of updates, say.

    `given` are pairs of an entry's name and `key=value`. Raises UsageError if no entry has that name, or the setting is
    one that all share or that the comparison itself sets.
    """
    fixed = {entry.name: {*SHARED, *(one.split("=", 1)[0] for one in entry.overrides)} for entry in entries}
    for name, override in given:
        if name not in fixed:
            raise UsageError(
                f"--set-for {name}: there is no such entry; give one of {', '.join(sorted(fixed))}",
                code="unknown-entry",
            )
        key = override.split("=", 1)[0].strip()
        if any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in fixed[name]):
            raise UsageError(
                f"--set-for {name}: all entries share `{key}`, or the comparison sets it for them; leave it out",
                code="shared-setting",
                key=key,
            )
    return [replace(entry, own=tuple(one for name, one in given if name == entry.name)) for entry in entries]


def _contender(
    settings: Settings, kind: str, name: str, accumulate: int, *, ranks: int, micro_batches: int
) -> Contender:
    """Makes one entry, which updates every `accumulate` micro-batches."""
    # Steps of the settings count updates of `training.accumulate` micro-batches: they become as many updates of this
    # entry as see the same samples.
    own = settings.training.accumulate
    schedule = settings.schedule
    flushes = settings.training.steps * own // micro_batches
    steps = flushes * micro_batches // accumulate
    # Evaluations lie between flushes, so that all entries are evaluated after the same samples.
    if settings.validation.every is None:
        flushes_between = flushes // EVALUATIONS
    else:
        flushes_between = max(1, round(settings.validation.every * own / micro_batches))
    overrides = [
        f"strategy={kind}",
        f"stages={ranks}",
        f"training.accumulate={accumulate}",
        f"training.steps={steps}",
        f"validation.every={flushes_between * micro_batches // accumulate}",
        f"schedule.warmup={schedule.warmup * own // accumulate}",
        f"schedule.milestones={[milestone * own // accumulate for milestone in schedule.milestones]}",
        f"logging.trace_packets={max(settings.logging.trace_packets, 6 * micro_batches)}",
        "checkpoint.every=null",
    ]
    if kind != "decoupled":
        overrides += [f"{key}={json.dumps(value)}" for key, value in STAGES_ALONE.items()]
    if not isinstance(settings.cut, str) and len(settings.cut) != ranks:
        overrides.append("cut=time")
    processes = 1 if kind == "backprop" else ranks
    return Contender(name, kind, processes, accumulate, steps, tuple(overrides))
