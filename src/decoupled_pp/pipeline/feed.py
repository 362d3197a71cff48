"""Turns batches into the packets of a run, in order: training, checkpoints, held-out evaluation, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet
from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.device import on_device
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Packet, PacketKind, map_payload


@dataclass(frozen=True)
class Itinerary:
    """The schedule of a run, in optimizer steps."""

    steps: int  # in all
    start: int = 0  # already done (resume)
    accumulate: int = 1  # training packets per optimizer step
    validate_every: int | None = None  # None: only at the end
    validation_batches: int | None = None  # micro-batches per evaluation; None: all
    save_every: int | None = None  # None: only at the end
    save: bool = False  # True if there are checkpoints at all


class Feed(Inlet):
    """The inlet of the first stage. A requested stop is honoured between optimizer steps: save, then end."""

    def __init__(
        self,
        train: BatchSource | None,
        validation: BatchSource | None,
        itinerary: Itinerary,
        device: torch.device,
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        weights: Mapping[PacketKind, Callable[[Batch], float]] = MappingProxyType({}),
    ) -> None:
        self._train = train  # None for an evaluation only
        self._validation = validation
        self._itinerary = itinerary
        self._device = device
        self._stop_requested = stop_requested
        self._weights = weights  # how much a micro-batch counts, by kind; 1 where nothing is said
        self._packets = self._stream()  # a generator: nothing is read before the first `receive`

    def receive(self) -> Packet:
        """Return the next packet of the run, on the device."""
        return next(self._packets)

    def _stream(self) -> Iterator[Packet]:
        plan = self._itinerary
        held_out = self._held_out()  # opened before anything is trained: it may be at fault
        step = plan.start
        number = plan.start * plan.accumulate
        batches: Iterator[Batch] = iter(())
        if self._train is not None and step < plan.steps:
            batches = self._train.batches(number)
        stopping = False
        while step < plan.steps and not stopping:
            for _ in range(plan.accumulate):
                yield self._packet(PacketKind.TRAIN, number, next(batches))
                number += 1
            step += 1
            last = step == plan.steps
            stopping = self._stop_requested()
            # Saved before it is evaluated: a fault in the held-out data must cost no training.
            if plan.save and (last or stopping or _due(step, plan.save_every)):
                yield Packet(PacketKind.SAVE, number)
            if not stopping and (last or _due(step, plan.validate_every)):
                yield from self._evaluation(number, held_out)
                held_out = None
        if plan.start >= plan.steps:
            yield from self._evaluation(number, held_out)
        yield Packet(PacketKind.END, number)

    def _held_out(self) -> Iterator[Batch] | None:
        """Begin a pass over the held-out data by reading its first batch; None without such data."""
        if self._validation is None:
            return None
        batches = islice(self._validation.batches(), self._itinerary.validation_batches)
        first = next(batches, None)
        if first is None:
            raise UsageError(
                "there is no held-out batch to validate on; give at least one, or leave validation out",
                code="no-held-out-batch",
            )
        return chain([first], batches)

    def _evaluation(self, number: int, opened: Iterator[Batch] | None) -> Iterator[Packet]:
        held_out = opened or self._held_out()
        if held_out is None:
            return
        for batch in held_out:
            yield self._packet(PacketKind.EVALUATE, number, batch)
        yield Packet(PacketKind.EVALUATION_END, number)

    def _packet(self, kind: PacketKind, number: int, batch: Batch) -> Packet:
        payload, target = batch
        # Here, before it is on the device, and once for all stages: nobody waits for a GPU to count.
        weight = self._weights[kind](batch) if kind in self._weights else 1.0
        return Packet(kind, number, map_payload(self._fed, payload), map_payload(self._fed, target), weight=weight)

    def _fed(self, tensor: Tensor) -> Tensor:
        # Detached: a graph behind a target would be shared by all stages, and only one backward pass can go through it.
        # A copy of one from `inference_mode` is an ordinary tensor, which layers may save for backward.
        return on_device(tensor.clone() if tensor.is_inference() else tensor.detach(), self._device)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
