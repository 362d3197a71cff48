"""Defines probes, which look at the packets of a stage and change nothing that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Payload
from decoupled_pp.pipeline.activations import SavedActivations

_NOTHING = nullcontext()


class Probe:
    """A probe that sees everything and does nothing with it; subclasses override what they need."""

    def watching(self) -> AbstractContextManager[object]:
        """Return the context in which the next training packet is computed."""
        return _NOTHING

    def trained(self, view: View) -> None:
        """Look at a training packet, after its output has left."""

    def evaluated(self, hidden: Payload, target: Payload) -> None:
        """Look at the stage's output for a held-out packet."""

    def results(self) -> dict[str, Any]:
        """Return the findings of the evaluation that ends now, by their keys in the record of the evaluation."""
        return {}


class ActivationProbe(Probe):
    """Counts the activations that the first packet with a backward pass keeps for it: `peak`, in bytes."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self.peak: int | None = None  # None before the first packet; 0 until a packet keeps some
        self._excluded = list(excluded)  # parameters and buffers, which are no activations

    def watching(self) -> AbstractContextManager[object]:
        """Return a counting context until some are kept, and none afterwards: counting costs time."""
        return _NOTHING if self.peak else self._counting()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with SavedActivations(self._excluded) as saved:
            yield
        self.peak = saved.peak
