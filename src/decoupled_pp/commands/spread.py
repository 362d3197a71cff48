"""Summarizes a number over the repeats of a run: its median, and how far the repeats lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from decoupled_pp.core.records import JsonRecord


@dataclass(frozen=True)
class Spread(JsonRecord):
    """Median, least and greatest of some repeats.

    Attributes:
        median: Median.
        low: Least value.
        high: Greatest value.
    """

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Self | None:
        """Returns the spread of the values that are known; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None

    def scaled(self, factor: float) -> Self:
        """Returns the spread in another unit."""
        return type(self)(self.median * factor, self.low * factor, self.high * factor)


def loss_or_infinity(recorded: float | None) -> float:
    """Returns a recorded loss; None stands for one that was not finite, which is worse than all others."""
    return math.inf if recorded is None else recorded
