"""Micro-batches from samples that can only be read in order (streaming data sets)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from decoupled_pp.contracts import Batch, BatchSource, UsageError
from decoupled_pp.data.seeds import Purpose, mixed_seed
from decoupled_pp.sections import HuggingFaceData

Sample: TypeAlias = tuple[Tensor, Tensor]
"""(input, target) without the batch dimension."""

Rows: TypeAlias = Any
"""A `datasets.Dataset` or `datasets.IterableDataset` (the package is optional, so its types cannot be named)."""


class StreamedBatches(BatchSource):
    """Batches of consecutive samples of a stream.

    The length of a stream is not known, so resuming at batch n reads (and drops) everything before n.
    """

    def __init__(self, samples: Callable[[int], Iterable[Sample]], batch_size: int, endless: bool) -> None:
        """Batch a stream.

        Args:
            samples: Epoch number -> its samples; the same epoch must give the same samples.
            batch_size: Samples per batch.
            endless: Training: epoch after epoch, without the last partial batch of an epoch (unless it is the only
                one). Else one pass that keeps it.
        """
        self._samples = samples
        self._batch_size = batch_size
        self._endless = endless

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on.

        Raises:
            UsageError: The stream holds no samples.
        """
        return islice(self._from_the_first(), start, None)

    def _from_the_first(self) -> Iterator[Batch]:
        for epoch in count() if self._endless else (0,):
            complete = 0
            stream = iter(self._samples(epoch))
            while samples := list(islice(stream, self._batch_size)):
                if len(samples) < self._batch_size and self._endless and complete:
                    break
                complete += 1
                inputs, targets = zip(*samples, strict=True)
                yield torch.stack(inputs), torch.stack(targets)
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
) -> dict[str, StreamedBatches]:
    """The two sources of a streamed data set."""
    return {
        "train": StreamedBatches(train, settings.batch_size, endless=True),
        "validation": StreamedBatches(validation, settings.validation_batch_size or settings.batch_size, endless=False),
    }
