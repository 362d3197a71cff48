"""Makes micro-batches from samples that can only be read in order (streaming data sets)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from decoupled_pp.core.datasets import BatchSource, Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Augmentation, changed
from decoupled_pp.data.seeds import Purpose, mixed_seed
from decoupled_pp.settings.sections import HuggingFaceData

Sample: TypeAlias = tuple[Tensor, Tensor]  # (input, target) without the batch dimension

# A `datasets.Dataset` or `datasets.IterableDataset`: the package is optional, so its types cannot be named.
Rows: TypeAlias = Any


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
        samples: Callable[[int], Iterable[Sample]],  # epoch number -> its samples, the same every time
        batch_size: int,
        endless: bool,  # True for training: epoch after epoch, without an epoch's last partial batch
        *,
        seed: int = 0,  # of `change` in training
        change: Augmentation | None = None,
        collate: Callable[[Sequence[Sample]], Batch] = stacked,
    ) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._endless = endless
        self._seed = seed
        self._change = change
        self._collate = collate

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on."""
        seed = self._seed if self._endless else None
        for number, batch in enumerate(islice(self._all_batches(), start, None), start):
            yield changed(batch, self._change, number, seed)

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


def streamed_data(
    info: DataInfo,
    settings: HuggingFaceData,
    train: Callable[[int], Iterator[Sample]],
    validation: Callable[[int], Iterator[Sample]],
    **more: Any,
) -> Data:
    """Return a streamed data set; `more` are further arguments of `StreamedBatches`."""
    size = settings.validation_batch_size or settings.batch_size
    training = StreamedBatches(train, settings.batch_size, endless=True, **more)
    return Data(info, training, StreamedBatches(validation, size, endless=False, **more))


def expect_text(value: object, column: str) -> str:
    """Return the value of a text column."""
    if not isinstance(value, str):
        raise UsageError(
            f"`data.text_column` {column!r} holds {type(value).__name__}, not text; name another column",
            code="wrong-column-type",
            key="data.text_column",
        )
    return value
