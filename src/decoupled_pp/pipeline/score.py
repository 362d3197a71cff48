"""Scores an exit by held-out loss and accuracy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from decoupled_pp.core.criterion import Criterion
from decoupled_pp.core.packets import Payload


class ExitScore:
    """Held-out loss and accuracy of one exit, summed on the device and read once at the end.

    The loss is that of all micro-batches as one, however they are split: their mean, or sum, as the criterion is.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = criterion
        self._loss: Tensor | float = 0.0
        self._weight = 0.0
        self._correct: Tensor | float = 0.0
        self._counted: Tensor | float = 0.0
        self._classes = True

    def add(self, logits: Tensor, target: Payload, weight: float) -> None:
        """Add one micro-batch that counts as much as its criterion says (`Criterion.weight`)."""
        if not weight:  # its loss is 0 / 0
            return
        loss = self._criterion(logits, target)
        # fp64, because fp32 sums of many micro-batches would depend on their number and order in the digits shown.
        self._loss = self._loss + loss.double() * (1.0 if self._criterion.sums else weight)
        self._weight += weight
        hits = self._criterion.hits(logits, target)
        if hits is None:
            self._classes = False
            return
        self._correct = self._correct + hits.correct.double()
        self._counted = self._counted + hits.counted.double()

    def sums(self) -> list[float | None]:
        """Return the sums (loss, weight, correct or None, counted), to be joined with others' by `join`."""
        correct = float(self._correct) if self._classes else None
        return [float(self._loss), self._weight, correct, float(self._counted)]

    def join(self, parts: list[list[Any]]) -> tuple[float, float | None]:
        """Return the `result` of several scores of this criterion, each given by its `sums`."""
        whole = ExitScore(self._criterion)
        whole._loss = sum(part[0] for part in parts)
        whole._weight = sum(part[1] for part in parts)
        whole._classes = all(part[2] is not None for part in parts)
        whole._correct = sum(part[2] or 0.0 for part in parts)
        whole._counted = sum(part[3] for part in parts)
        return whole.result()

    def result(self) -> tuple[float, float | None]:
        """Return the loss and, for class targets, the share classified right (None otherwise)."""
        if not self._weight:
            return float("nan"), None
        loss = float(self._loss) / (1.0 if self._criterion.sums else self._weight)
        counted = float(self._counted)
        return loss, float(self._correct) / counted if self._classes and counted else None
