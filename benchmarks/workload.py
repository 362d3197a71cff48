"""The work of an emulated pipeline: how much of it, and how long each micro-batch takes. No torch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WIDTH = 64
"""Features of a sample; the activations of a micro-batch are (batch, WIDTH) in fp32."""

TIMEOUT = 60.0
"""Seconds that one rank may wait for another, beyond the work itself."""

_WARM_UP = 5
_NUMBERS_PER_REPEAT = 10**6


@dataclass(frozen=True)
class Unevenness:
    """Deviations of durations from their nominal value.

    Attributes:
        slow_stage: The rank that is slower at random moments.
        slow_factor: A slow micro-batch's forward and backward there take this many times as long.
        slow_share: Probability that a micro-batch is slow, independently of all others.
        jitter: "exponential": every forward and every backward is drawn from an exponential distribution with its
            duration as the mean; "none".
    """

    slow_stage: int = 0
    slow_factor: float = 1.0
    slow_share: float = 0.0
    jitter: str = "none"

    @property
    def drawn(self) -> bool:
        """True if anything is left to chance."""
        return self.jitter != "none" or (self.slow_factor != 1 and self.slow_share > 0)

    @property
    def slowest_mean(self) -> float:
        """Expected duration of a micro-batch on the slowest rank, over its nominal duration."""
        return max(1.0, 1 + self.slow_share * (self.slow_factor - 1))

    def __str__(self) -> str:
        """Returns one line for a table's head; empty if all durations are equal."""
        parts = []
        if self.slow_share:
            parts.append(
                f"stage {self.slow_stage} takes {self.slow_factor:g} times as long for {self.slow_share:g} of the "
                "micro-batches, at random"
            )
        if self.jitter != "none":
            parts.append(f"every duration is drawn, {self.jitter} about its mean")
        return "; ".join(parts)


@dataclass(frozen=True)
class Workload:
    """The work that every contender is given.

    Attributes:
        ranks: Number of ranks.
        forward_seconds: Emulated forward of one rank and micro-batch.
        backward_seconds: Emulated backward of one rank and micro-batch.
        batch: Samples per micro-batch.
        packets: Micro-batches per measurement of a decoupled pipeline, after `fill` that are not counted.
        micro_batches: Micro-batches per optimizer step of a pipelined baseline.
        steps: Optimizer steps per measurement of a pipelined baseline, after one that is not counted.
        capacity: Packets a link of the decoupled pipeline may hold.
        unevenness: How durations differ.
    """

    ranks: int
    forward_seconds: float
    backward_seconds: float
    batch: int
    packets: int
    micro_batches: int
    steps: int
    capacity: int
    unevenness: Unevenness = field(default_factory=Unevenness)

    @property
    def nominal_seconds(self) -> float:
        """Expected duration of a micro-batch on the slowest rank."""
        return (self.forward_seconds + self.backward_seconds) * self.unevenness.slowest_mean

    @property
    def fill(self) -> int:
        """Packets that fill a decoupled pipeline before it is measured."""
        return max(_WARM_UP, self.packets // 5)

    @property
    def message_bytes(self) -> int:
        """Bytes that one stage sends the next per micro-batch."""
        return 4 * WIDTH * self.batch


class Durations:
    """Factors by which the layers of one rank multiply their sleeps.

    A draw depends on rank, repeat and number of the micro-batch only. So all strategies, and a rank's compute alone,
    get the same durations for the same micro-batches, whatever their order. The layers of a rank share them.

    Attributes:
        unevenness: How durations differ.
        repeat: The present repeat; each has draws of its own.
    """

    def __init__(self, unevenness: Unevenness, rank: int, repeat: int = 0) -> None:
        """Starts at micro-batch 0 of a repeat."""
        self.unevenness = unevenness
        self.repeat = repeat
        self._rank = rank
        self._first = 0
        self._paused = False
        self._counts: Counter[int] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Durations:
        """Returns this object: a copied layer stays on its rank."""
        return self

    def restart(self, uncounted: int) -> None:
        """Makes the next micro-batches `uncounted` for the warm-up, and then number 0 of the present repeat."""
        self._first = -uncounted
        self._counts.clear()

    @property
    def drawn(self) -> bool:
        """True if anything is left to chance at present."""
        return self.unevenness.drawn and not self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Makes all factors 1 for as long as the context lasts."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def next(self, layer: object) -> tuple[float, float]:
        """Returns the factors of forward and backward of the next micro-batch of a layer."""
        number = self._first + self._counts[id(layer)]
        self._counts[id(layer)] += 1
        return self.factors(number) if self.drawn else (1.0, 1.0)

    def factors(self, number: int) -> tuple[float, float]:
        """Returns the factors of forward and backward of one micro-batch of the present repeat."""
        if not self.unevenness.drawn:
            return 1.0, 1.0
        draw = random.Random(f"rank {self._rank}, micro-batch {_NUMBERS_PER_REPEAT * self.repeat + number}")
        slow = draw.random() < self.unevenness.slow_share and self._rank == self.unevenness.slow_stage
        forward, backward = draw.expovariate(1.0), draw.expovariate(1.0)
        if self.unevenness.jitter == "none":
            forward = backward = 1.0
        factor = self.unevenness.slow_factor if slow else 1.0
        return forward * factor, backward * factor
