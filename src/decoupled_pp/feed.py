"""Batches -> the packets of a run, in order: training, held-out evaluation, checkpoints, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from decoupled_pp.contracts import Batch, BatchSource, Inlet, Packet, PacketKind, map_payload
from decoupled_pp.device import on_device


@dataclass(frozen=True)
class Itinerary:
    """What a run does when.

    Attributes:
        steps: Optimizer steps in all.
        start: Optimizer steps already done (resume).
        accumulate: Training packets per optimizer step.
        validate_every: Optimizer steps between evaluations; None: only at the end.
        validation_batches: Micro-batches per evaluation; None: all.
        save_every: Optimizer steps between checkpoints; None: only at the end.
        save: Whether there are checkpoints at all.
    """

    steps: int
    start: int = 0
    accumulate: int = 1
    validate_every: int | None = None
    validation_batches: int | None = None
    save_every: int | None = None
    save: bool = False


class Feed(Inlet):
    """The inlet of the first stage. A requested stop is honoured between optimizer steps: save, then end."""

    def __init__(
        self,
        train: BatchSource | None,
        validation: BatchSource | None,
        itinerary: Itinerary,
        device: torch.device,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make the stream; nothing is read before the first `receive`.

        Args:
            train: Training micro-batches; None for an evaluation only.
            validation: Held-out micro-batches, or None.
            itinerary: What to do when.
            device: Where the first stage computes.
            stop_requested: Asked between optimizer steps.
        """
        self._train, self._validation = train, validation
        self._itinerary, self._device, self._stop_requested = itinerary, device, stop_requested
        self._packets = self._stream()

    def receive(self) -> Packet:
        """The next packet of the run, on the device."""
        return next(self._packets)

    def _stream(self) -> Iterator[Packet]:
        plan = self._itinerary
        number, step = plan.start * plan.accumulate, plan.start
        batches = self._train.batches(number) if self._train is not None and step < plan.steps else iter(())
        stopping = False
        while step < plan.steps and not stopping:
            for _ in range(plan.accumulate):
                yield self._packet(PacketKind.TRAIN, number, next(batches))
                number += 1
            step += 1
            last, stopping = step == plan.steps, self._stop_requested()
            if not stopping and (last or _due(step, plan.validate_every)):
                yield from self._evaluation(number)
            if plan.save and (last or stopping or _due(step, plan.save_every)):
                yield Packet(PacketKind.SAVE, number)
        if plan.start >= plan.steps:
            yield from self._evaluation(number)
        yield Packet(PacketKind.END, number)

    def _evaluation(self, number: int) -> Iterator[Packet]:
        if self._validation is None:
            return
        for batch in islice(self._validation.batches(), self._itinerary.validation_batches):
            yield self._packet(PacketKind.EVALUATE, number, batch)
        yield Packet(PacketKind.EVALUATION_END, number)

    def _packet(self, kind: PacketKind, number: int, batch: Batch) -> Packet:
        # Detached: a graph behind a target would be one for all stages, and its backward pass goes through it once.
        payload, target = (map_payload(lambda t: on_device(t.detach(), self._device), part) for part in batch)
        return Packet(kind, number, payload, target)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
