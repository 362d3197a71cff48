"""Joins the gradients of the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Accumulation:
    """Makes the gradient of a step that of its micro-batches as one batch: sum_i w_i g_i / sum_i w_i.

    Weights w_i are not known ahead. So gradients add up relative to the first micro-batch that counts, and are scaled
    once, at the end. Where all count alike that is the gradient of sum_i loss_i / count, bit by bit.
    """

    def __init__(self, count: int, *, sums: bool = False) -> None:
        """Accumulate over `count` micro-batches; with `sums` their losses add up, whatever they weigh."""
        self._count = count
        self._sums = sums
        self._unit = 0.0  # weight of the first micro-batch that counts; 0 before it
        self._weight = 0.0  # of the present micro-batch
        self._total = 0.0

    def begin(self, weight: float) -> None:
        """Go on with a micro-batch of this weight."""
        self._weight = weight
        self._unit = self._unit or weight
        self._total += weight

    def part(self, loss: Tensor) -> Tensor:
        """Return what to differentiate for the loss of the present micro-batch; or so scaled, a gradient of it."""
        if self._sums or self._count == 1:  # dividing by 1 would be another operation in the graph
            return loss
        mean = loss / self._count
        return mean if self._weight == self._unit else mean * (self._weight / self._unit)

    def whole(self, part: Tensor) -> Tensor:
        """Return what a tensor would be if it had not come from `part` of the loss, but from the loss."""
        if self._sums or self._count == 1:
            return part
        return part * self._count / (self._weight / self._unit)

    def finish(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Scale the gradients that have gathered, and start anew; return False if no micro-batch counted."""
        counted = self._total > 0
        factor = self._count * self._unit / self._total if counted and not self._sums else 1.0
        self._unit = 0.0
        self._total = 0.0
        if factor != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return counted
