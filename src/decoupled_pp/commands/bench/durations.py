"""How long a rank's emulated compute takes: always the same, or drawn per micro-batch, alike for every strategy."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from decoupled_pp.core.errors import UsageError

JITTERS = ("none", "exponential")
_REPEAT = 10**6  # micro-batch numbers from one repeat to the next


@dataclass(frozen=True)
class Unevenness:
    """How durations differ from their nominal value.

    Attributes:
        slow_stage: The rank that is slower at random moments.
        slow_factor: By how much: a micro-batch's forward and backward there take this many times as long...
        slow_share: ...with this probability, independently of all other micro-batches.
        jitter: "exponential": every forward and every backward is drawn from an exponential distribution with its
            duration as the mean; "none".
    """

    slow_stage: int = 0
    slow_factor: float = 1.0
    slow_share: float = 0.0
    jitter: str = "none"

    @property
    def drawn(self) -> bool:
        """Whether anything is left to chance."""
        return self.jitter != "none" or (self.slow_factor != 1 and self.slow_share > 0)

    @property
    def slowest_mean(self) -> float:
        """Expected duration of a micro-batch on the slowest rank, in its nominal duration."""
        return max(1.0, 1 + self.slow_share * (self.slow_factor - 1))


class Durations:
    """What the layers of one rank multiply their sleeps by.

    A draw depends on rank, repeat and number of the micro-batch alone, so that all strategies, and a rank's compute
    alone, get the same durations for the same micro-batches, whatever their order. Layers of one rank share them.

    Attributes:
        repeat: The present repeat; each has draws of its own.
    """

    def __init__(self, unevenness: Unevenness, rank: int, repeat: int = 0) -> None:
        """The draws of one rank."""
        self.unevenness, self._rank = unevenness, rank
        self.repeat, self._first, self._paused = repeat, 0, False
        self._counts: Counter[int] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Durations:
        """The same: a copied layer stays on its rank."""
        return self

    def restart(self, uncounted: int) -> None:
        """The next micro-batches are `uncounted` to warm up, and then number 0 of the present repeat."""
        self._first = -uncounted
        self._counts.clear()

    @property
    def drawn(self) -> bool:
        """Whether anything is left to chance at present."""
        return self.unevenness.drawn and not self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is multiplied meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def next(self, layer: object) -> tuple[float, float]:
        """Factors of forward and backward of the micro-batch that a layer has come to; layers take them in order."""
        number = self._first + self._counts[id(layer)]
        self._counts[id(layer)] += 1
        return self.factors(number) if self.drawn else (1.0, 1.0)

    def factors(self, number: int) -> tuple[float, float]:
        """Factors of forward and backward of one micro-batch of the present repeat, drawn if anything is ever drawn."""
        if not self.unevenness.drawn:
            return 1.0, 1.0
        draw = random.Random(f"rank {self._rank}, micro-batch {_REPEAT * self.repeat + number}")
        slow = draw.random() < self.unevenness.slow_share and self._rank == self.unevenness.slow_stage
        forward, backward = draw.expovariate(1.0), draw.expovariate(1.0)
        if self.unevenness.jitter == "none":
            forward = backward = 1.0
        by = self.unevenness.slow_factor if slow else 1.0
        return forward * by, backward * by


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that make durations uneven."""
    parser.add_argument("--slow-factor", type=float, help="one stage takes this many times as long at random moments")
    parser.add_argument("--slow-share", type=float, help="share of its micro-batches that do (default: 0.33)")
    parser.add_argument("--slow-stage", type=int, help="which stage (default: the middle one)")
    parser.add_argument(
        "--jitter", choices=JITTERS, default="none", help="distribution of every forward and backward about its mean"
    )


def unevenness_of(chosen: argparse.Namespace) -> Unevenness:
    """The options, checked.

    Raises:
        UsageError: A value is out of range, or would have no effect.
    """
    factor, share, stage = chosen.slow_factor, chosen.slow_share, chosen.slow_stage
    if factor is None:
        for name, value in (("--slow-share", share), ("--slow-stage", stage)):
            if value is not None:
                raise UsageError(f"{name} {value} has no effect without --slow-factor; add it, or leave this out")
        return Unevenness(jitter=chosen.jitter)
    share = 0.33 if share is None else share
    stage = chosen.ranks // 2 if stage is None else stage
    if factor <= 1:
        raise UsageError(f"--slow-factor {factor:g} must be above 1")
    if not 0 < share <= 1:
        raise UsageError(f"--slow-share {share:g} must be above 0 and at most 1")
    if not 0 <= stage < chosen.ranks:
        raise UsageError(f"--slow-stage {stage} must be one of 0 to {chosen.ranks - 1}")
    return Unevenness(stage, factor, share, chosen.jitter)


def describe(unevenness: Unevenness) -> str:
    """One line for a table's head; empty if all durations are equal."""
    parts = []
    if unevenness.slow_share:
        parts.append(
            f"stage {unevenness.slow_stage} takes {unevenness.slow_factor:g} times as long "
            f"for {unevenness.slow_share:g} of the micro-batches, at random"
        )
    if unevenness.jitter != "none":
        parts.append(f"every duration is drawn, {unevenness.jitter} about its mean")
    return "; ".join(parts) + "\n" if parts else ""
