"""Builds the learning-rate schedules of a stage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.settings.run import ScheduleSettings

ScheduleFactory: TypeAlias = Callable[[Optimizer], LRScheduler]
"""Makes the schedule of one optimizer; it moves on once in every optimizer step."""


@dataclass
class Plateau:
    """Lowers the rate of a stage whose held-out loss has stopped falling, as torch's `ReduceLROnPlateau` does."""

    settings: ScheduleSettings
    scale: float = 1.0  # present factor of the rate
    best: float = math.inf  # the lowest loss so far
    waited: int = 0  # evaluations since then
    heard: int = 0  # the step of the last evaluation
    every: int | None = None  # steps between evaluations; others, such as that at the end of a run, do not count

    THRESHOLD: ClassVar[float] = 1e-4  # torch's: a smaller relative improvement is none

    def hear(self, loss: float, step: int) -> None:
        """Take the held-out loss after a step; the evaluations of one step count once."""
        if step <= self.heard or (self.every is not None and step % self.every):
            return
        self.heard = step
        self.waited += 1
        if loss < self.best * (1 - self.THRESHOLD):
            self.best = loss
            self.waited = 0
        if self.waited > self.settings.patience:
            self.scale = max(self.scale * self.settings.factor, self.settings.final)
            self.waited = 0

    def state(self) -> dict[str, float | int]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "best": self.best, "waited": self.waited, "heard": self.heard}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one starts anew."""
        for key in self.state():
            setattr(self, key, state.get(key, getattr(Plateau, key)))


def build_schedules(
    choice: ScheduleSettings | ScheduleFactory,
    optimizers: list[Optimizer],
    steps: int,
    done: int = 0,
    plateau: Plateau | None = None,
) -> list[LRScheduler]:
    """Build one scheduler per optimizer, `done` steps on its way; none for a constant rate."""
    if not isinstance(choice, ScheduleSettings):
        return [_from_factory(choice, optimizer, done) for optimizer in optimizers]
    # The rate is a function of the step alone: a resumed run needs nothing but its step, and may change the settings.
    if choice.kind == "constant" and not choice.warmup:
        return []

    def factor(step: int) -> float:
        return rate_factor(choice, step, steps) * (1.0 if plateau is None else plateau.scale)

    schedules: list[LRScheduler] = [LambdaLR(optimizer, factor) for optimizer in optimizers]
    for schedule in schedules:
        # Set by hand: `step()` called `done` times before any optimizer step would warn, and take its time.
        schedule.last_epoch = done
        set_rates(schedule)
    return schedules


def set_rates(schedule: LRScheduler) -> None:
    """Let the optimizer have the rates of the schedule's present step."""
    assert isinstance(schedule, LambdaLR)
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)


def rate_factor(settings: ScheduleSettings, step: int, steps: int) -> float:
    """Return the multiplier of the learning rate at optimizer step `step` (from 0) of `steps`."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.kind in ("constant", "plateau"):
        return 1.0
    if settings.kind == "steps":
        return float(settings.factor ** sum(step >= milestone for milestone in settings.milestones))
    progress = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    remaining = (1 + math.cos(math.pi * progress)) / 2
    if settings.kind == "linear":
        remaining = 1 - progress
    return settings.final + (1 - settings.final) * remaining


def _from_factory(make: ScheduleFactory, optimizer: Optimizer, done: int) -> LRScheduler:
    """Build a schedule of the user's own; its first `done` steps are taken again, so a checkpoint needs none of it."""
    for group in optimizer.param_groups:  # an earlier schedule may have moved it
        group["lr"] = group.get("initial_lr", group["lr"])
    try:
        schedule = make(optimizer)
    except TypeError as error:
        raise _unfit(f"fails on an optimizer: {first_line(error)}") from error
    if isinstance(schedule, ReduceLROnPlateau):
        raise _unfit("returned a ReduceLROnPlateau, which is this trainer's own kind 'plateau': set `schedule.kind`")
    if not isinstance(schedule, LRScheduler) or schedule.optimizer is not optimizer:
        raise _unfit(f"returned {type(schedule).__name__}, not a scheduler of the optimizer that it was given")
    with warnings.catch_warnings():  # the optimizer's own steps were taken in an earlier run
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(done):
            schedule.step()
    return schedule


def _unfit(fault: str) -> UsageError:
    return UsageError(
        f"`schedule`: the function {fault}; give a function of an optimizer that returns a torch scheduler, such as "
        "lambda optimizer: CosineAnnealingLR(optimizer, T_max=1000)",
        code="schedule-factory-unfit",
        key="schedule",
    )
