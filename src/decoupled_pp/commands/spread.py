"""Summarizes a number over the repeats of a run, and shows it in a column of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from decoupled_pp.core.records import JsonRecord


@dataclass(frozen=True)
class Spread(JsonRecord):
    """Median, least and greatest of some repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Self | None:
        """Returns the spread of the values that are known; None if there are none."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


class Column(NamedTuple):
    """One column of a table."""

    title: str
    read: Callable[[Any], Spread | float | str | None]  # takes a row, which is an object
    form: str = ""  # format of a number
    unit: float = 1  # a number is multiplied by it before
    missing: str = "-"  # stands for None

    def cell(self, row: Any) -> tuple[str, str]:
        """Returns the value of a row as text, and the range of the repeats if they differ."""
        value = self.read(row)
        if value is None:
            return self.missing, ""
        if isinstance(value, str):
            return value, ""
        if not isinstance(value, Spread):
            return format(value * self.unit, self.form), ""
        median, low, high = (format(one * self.unit, self.form) for one in (value.median, value.low, value.high))
        return median, f"{low} .. {high}" if low != high else ""


def loss_or_infinity(recorded: float | None) -> float:
    """Returns a recorded loss; None stands for one that was not finite, which is worse than all others."""
    return math.inf if recorded is None else recorded
