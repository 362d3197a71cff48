"""Micro-batches from samples that can only be read in order (streaming data sets)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Augmentation
from decoupled_pp.data.seeds import Purpose, generator, mixed_seed
from decoupled_pp.settings.sections import HuggingFaceData

Sample: TypeAlias = tuple[Tensor, Tensor]
"""(input, target) without the batch dimension."""

Rows: TypeAlias = Any
"""A `datasets.Dataset` or `datasets.IterableDataset` (the package is optional, so its types cannot be named)."""


Collate: TypeAlias = Callable[[Sequence[Sample]], Batch]
"""Samples -> a batch."""


def stacked(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape as a batch."""
    inputs, targets = zip(*samples, strict=True)
    return torch.stack(inputs), torch.stack(targets)


class StreamedBatches(BatchSource):
    """Batches of consecutive samples of a stream.

    The length of a stream is not known, so resuming at batch n reads (and drops) everything before n.
    """

    def __init__(
        self,
        samples: Callable[[int], Iterable[Sample]],
        batch_size: int,
        endless: bool,
        *,
        seed: int = 0,
        change: Augmentation | None = None,
        collate: Collate = stacked,
    ) -> None:
        """Batch a stream.

        Args:
            samples: Epoch number -> its samples; the same epoch must give the same samples.
            batch_size: Samples per batch.
            endless: Training: epoch after epoch, without the last partial batch of an epoch (unless it is the only
                one). Else one pass that keeps it.
            seed: Of `change`, in training.
            change: Applied to every batch, with random numbers that depend on its number.
            collate: Makes a batch of samples.
        """
        self._samples = samples
        self._batch_size = batch_size
        self._endless = endless
        self._seed, self._change, self._collate = seed, change, collate

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on.

        Raises:
            UsageError: The stream holds no samples.
        """
        return map(self._changed, count(start), islice(self._from_the_first(), start, None))

    def _changed(self, number: int, batch: Batch) -> Batch:
        if self._change is None:
            return batch
        purpose = Purpose.AUGMENTATION if self._endless else Purpose.HELD_OUT
        return self._change(batch, generator(self._seed if self._endless else 0, purpose, number))

    def _from_the_first(self) -> Iterator[Batch]:
        for epoch in count() if self._endless else (0,):
            complete = 0
            stream = iter(self._samples(epoch))
            while samples := list(islice(stream, self._batch_size)):
                if len(samples) < self._batch_size and self._endless and complete:
                    break
                complete += 1
                yield self._collate(samples)
            if not complete:
                raise UsageError("the streamed data set holds no whole sample; check data.path and data.context")


def windows(texts: Iterable[Tensor], context: int, skip: int) -> Iterator[Sample]:
    """Cut a stream of token tensors (any lengths) into samples of `context` tokens, after skipping `skip` tokens."""
    rest = torch.empty(0, dtype=torch.int64)
    for tokens in texts:
        rest = torch.cat((rest, tokens.long()))
        dropped, skip = min(skip, len(rest)), max(skip - len(rest), 0)
        position = dropped
        while position + context < len(rest):
            yield rest[position : position + context], rest[position + 1 : position + context + 1]
            position += context
        rest = rest[position:]


def shuffled(rows: Rows, settings: HuggingFaceData, seed: int, epoch: int) -> Rows:
    """A stream in the order of one epoch: a function of (seed, epoch) only."""
    return rows.shuffle(seed=mixed_seed(seed, Purpose.ORDER, epoch), buffer_size=settings.shuffle_buffer)


def stream_sources(
    settings: HuggingFaceData,
    train: Callable[[int], Iterator[Sample]],
    validation: Callable[[int], Iterator[Sample]],
    **more: Any,
) -> dict[str, StreamedBatches]:
    """The two sources of a streamed data set; `more` as for `StreamedBatches`."""
    held = settings.validation_batch_size or settings.batch_size
    return {
        "train": StreamedBatches(train, settings.batch_size, endless=True, **more),
        "validation": StreamedBatches(validation, held, endless=False, **more),
    }
