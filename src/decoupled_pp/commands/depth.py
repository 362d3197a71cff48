"""Measures what depth is worth in some runs, and how much of it decoupled training keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from decoupled_pp.commands.spread import Column, Spread, loss_or_infinity
from decoupled_pp.core.records import JsonRecord
from decoupled_pp.core.reports import Exit, FinalScores

SAYS_NOTHING = "depth buys nothing here: this run says nothing about learning"

Scored = Exit | FinalScores


@dataclass(frozen=True)
class Pair:
    """The exits of a decoupled run, and the whole network trained by plain backpropagation with the same seed."""

    exits: Sequence[Exit]
    plain: Scored


@dataclass(frozen=True)
class Depth(JsonRecord):
    """Holds the benefit of depth and the share of it that is kept, each with its spread over seeds.

    Attributes:
        benefit: The whole network trained by plain backpropagation against the first exit: points of accuracy, or
            percent of plain's loss where there is no accuracy.
        kept: Share of that benefit which the last exit of the decoupled run has: 1 is as good as plain, 0 as the
            first exit. None where `pays` is False.
        points: True if the scores are accuracies.
        pays: True if the benefit is larger than its spread over the seeds.
    """

    benefit: Spread = field(metadata={"read": Spread.from_json})
    kept: Spread | None = field(metadata={"read": Spread.from_json})
    points: bool
    pays: bool

    @property
    def text(self) -> str:
        """The measure in one line."""
        unit = "points" if self.points else "% of the loss"
        benefit = f"benefit of depth {_written(self.benefit, '+.2f')} {unit}"
        kept = SAYS_NOTHING if self.kept is None else f"benefit kept {_written(self.kept, '.2f')}"
        return f"{benefit}; {kept}"


def measure(pairs: Sequence[Pair]) -> Depth | None:
    """Returns what depth is worth over some seeds; None without scores, or with a single exit."""
    if not pairs or any(len(pair.exits) < 2 for pair in pairs):
        return None
    points = all(one.val_accuracy is not None for pair in pairs for one in (pair.exits[0], pair.exits[-1], pair.plain))
    found = [scores for pair in pairs if (scores := _scores(pair, points)) is not None]
    benefit = Spread.over(plain - first for first, _, plain in found)
    if benefit is None:
        return None
    pays = benefit.median > benefit.high - benefit.low  # one seed has no spread: any benefit counts
    kept = Spread.over((last - first) / (plain - first) for first, last, plain in found) if pays else None
    return Depth(benefit, kept, points, pays)


def _scores(pair: Pair, points: bool) -> tuple[float, float, float] | None:
    """Returns the scores of the first exit, the last exit and plain, on a scale where more is better."""
    of = (pair.exits[0], pair.exits[-1], pair.plain)
    if points:
        return tuple(100 * (one.val_accuracy or 0.0) for one in of)  # type: ignore[return-value]
    plain = pair.plain.val_loss
    losses = [one.val_loss for one in of]
    if not plain or any(loss is None or not math.isfinite(loss) for loss in losses):
        return None
    return tuple(-100 * loss / abs(plain) for loss in losses)  # type: ignore[operator,return-value]


def goodness(runs: Sequence[Scored]) -> tuple[float, float]:
    """Returns what orders runs of one task, the best last: the median accuracy, and the median loss among equals."""
    accuracies = [one.val_accuracy for one in runs if one.val_accuracy is not None]
    losses = [loss_or_infinity(one.val_loss) for one in runs]
    return statistics.median(accuracies) if accuracies else 0.0, -statistics.median(losses)


def columns(points: bool) -> list[Column]:
    """Returns the columns of a table whose rows have `depth`."""
    unit = "points" if points else "% of the loss"
    return [
        Column(f"benefit of depth, {unit}", lambda row: row.depth and row.depth.benefit, "+.2f"),
        Column("benefit kept", lambda row: row.depth and row.depth.kept, ".2f"),
    ]


def _written(spread: Spread, form: str) -> str:
    span = f" ({spread.low:{form}} .. {spread.high:{form}})" if spread.low != spread.high else ""
    return f"{spread.median:{form}}{span}"
