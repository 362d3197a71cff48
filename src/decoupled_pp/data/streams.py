"""Makes micro-batches from samples that can only be read in order (streaming data sets)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from decoupled_pp.core.datasets import BatchSource
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Augmentation, validation_batch_size
from decoupled_pp.data.seeds import Purpose, generator, mixed_seed
from decoupled_pp.settings.sections import HuggingFaceData

Sample: TypeAlias = tuple[Tensor, Tensor]
"""(input, target) without the batch dimension."""

Rows: TypeAlias = Any
"""A `datasets.Dataset` or `datasets.IterableDataset` (the package is optional, so its types cannot be named)."""

Collate: TypeAlias = Callable[[Sequence[Sample]], Batch]
"""Makes a batch of samples."""


def stacked(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one shape."""
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
        """Batch a stream."""
        self._samples = samples
        self._batch_size = batch_size
        self._endless = endless
        self._seed = seed
        self._change = change
        self._collate = collate

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on."""
        return map(self._changed, count(start), islice(self._all_batches(), start, None))

    def _changed(self, number: int, batch: Batch) -> Batch:
        if self._change is None:
            return batch
        if self._endless:
            random = generator(self._seed, Purpose.AUGMENTATION, number)
        else:
            random = generator(0, Purpose.HELD_OUT, number)
        return self._change(batch, random)

    def _all_batches(self) -> Iterator[Batch]:
        for epoch in count() if self._endless else (0,):
            complete = 0
            stream = iter(self._samples(epoch))
            while samples := list(islice(stream, self._batch_size)):
                if len(samples) < self._batch_size and self._endless and complete:
                    break  # every batch of training has one size, unless the whole epoch is smaller
                complete += 1
                yield self._collate(samples)
            if not complete:
                raise UsageError(
                    "the streamed data set holds no whole sample; check `data.path`, or lower `data.context`",
                    code="too-little-data",
                    key="data.path",
                )


def windows(texts: Iterable[Tensor], context: int, skip: int) -> Iterator[Sample]:
    """Cut a stream of token tensors (any lengths) into samples of `context` tokens, after skipping `skip` tokens."""
    rest = torch.empty(0, dtype=torch.int64)  # tokens that do not fill a window yet
    for tokens in texts:
        rest = torch.cat((rest, tokens.long()))
        position = min(skip, len(rest))
        skip -= position
        while position + context < len(rest):  # strictly less: a window needs one token more, as its last target
            yield rest[position : position + context], rest[position + 1 : position + context + 1]
            position += context
        rest = rest[position:]


def shuffled(rows: Rows, settings: HuggingFaceData, seed: int, epoch: int) -> Rows:
    """Return a stream in the order of one epoch: a function of (seed, epoch) only."""
    return rows.shuffle(seed=mixed_seed(seed, Purpose.ORDER, epoch), buffer_size=settings.shuffle_buffer)


def stream_sources(
    settings: HuggingFaceData,
    train: Callable[[int], Iterator[Sample]],
    validation: Callable[[int], Iterator[Sample]],
    **more: Any,
) -> dict[str, StreamedBatches]:
    """Return the two sources of a streamed data set, by the names of `Data`'s fields."""
    return {
        "train": StreamedBatches(train, settings.batch_size, endless=True, **more),
        "validation": StreamedBatches(validation, validation_batch_size(settings), endless=False, **more),
    }


def expect_text(value: object, column: str) -> str:
    """Return the value of a text column."""
    if not isinstance(value, str):
        raise UsageError(
            f"`data.text_column` {column!r} holds {type(value).__name__}, not text; name another column",
            code="wrong-column-type",
            key="data.text_column",
        )
    return value
