"""Opens rows of a Hugging Face data set that are a sample and its class: images, or sentences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Samples, TrainingBatches, ValidationBatches, validation_batch_size
from decoupled_pp.data.splits import random_split
from decoupled_pp.data.streams import Rows, Sample, shuffled, stacked, stream_sources
from decoupled_pp.settings.sections import HuggingFaceData


class Reader(ABC):
    """Turns the sample of a row into a tensor, and several into a batch."""

    @abstractmethod
    def info(self, classes: int) -> DataInfo:
        """Return the facts about the data."""

    @abstractmethod
    def read(self, value: Any) -> Tensor:
        """Turn a value of the column into the input of one sample."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch of samples."""
        return stacked(samples)


def open_labelled(  # noqa: PLR0917 - the settings, the rows, and how to read them
    settings: HuggingFaceData,
    seed: int,
    train: Rows,
    validation: Rows | None,
    column: str,
    make_reader: Callable[[Any], Reader],
) -> Data:
    """Open samples with classes, which are read when their batch is taken."""
    labels = settings.label_column or "label"
    train = train.select_columns([column, labels])
    if validation is not None:
        validation = validation.select_columns([column, labels])
    first = next(iter(train), None)
    if first is None or (not settings.streaming and validation is None and len(train) < 2):
        raise UsageError(
            f"`data.train_split` {settings.train_split!r} of {settings.path!r} has fewer than 2 rows; take "
            "another split",
            code="too-few-rows",
            key="data.train_split",
        )
    classes = _count_classes([rows for rows in (train, validation) if rows is not None], settings, labels)
    reader = make_reader(first[column])

    def samples(rows: Rows) -> Iterator[Sample]:
        for row in rows:
            yield reader.read(row[column]), _label(row[labels], classes, labels)

    if settings.streaming:

        def train_epoch(epoch: int) -> Iterator[Sample]:
            return samples(shuffled(train, settings, seed, epoch))

        sources = stream_sources(settings, train_epoch, lambda _: samples(validation), collate=reader.collate)
        return Data(info=reader.info(classes), **sources)
    if validation is None:
        kept, held = random_split(len(train), settings.validation_fraction, seed)
        validation = train.select(held)
        train = train.select(kept)

    def loaded(rows: Rows) -> Samples:
        return _LoadedRows(rows, lambda chosen: reader.collate(list(samples(chosen))))

    return Data(
        info=reader.info(classes),
        train=TrainingBatches(lambda: loaded(train), settings.batch_size, seed),
        validation=ValidationBatches(lambda: loaded(validation), validation_batch_size(settings)),
    )


class _LoadedRows(Samples):
    """The rows of a loaded data set, read when taken."""

    def __init__(self, rows: Rows, batch: Callable[[Rows], Batch]) -> None:
        self._rows = rows
        self._batch = batch

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Tensor, epoch: int | None) -> Batch:
        return self._batch(self._rows.select(indices.tolist()))


def _label_fault(code: str, column: str, fault: str) -> UsageError:
    return UsageError(f"`data.label_column` {column!r} {fault}", code=code, key="data.label_column")


def _label(value: int, classes: int, column: str) -> Tensor:
    """Return a class number as an int64 scalar."""
    if not 0 <= value < classes:  # the hub marks unlabelled test rows with -1
        raise _label_fault(
            "label-out-of-range", column, f"holds {value}, not a class of 0..{classes - 1}; use a split with labels"
        )
    return torch.tensor(int(value))


def _count_classes(splits: list[Rows], settings: HuggingFaceData, column: str) -> int:
    """Return the number of classes: of the ClassLabel feature, or else the largest label of all rows + 1."""
    names = getattr((splits[0].features or {}).get(column), "num_classes", None)
    if names is not None:
        return int(names)
    if settings.streaming:
        raise _label_fault(
            "class-count-unknown",
            column,
            "is no ClassLabel, so a stream does not tell the number of classes; set `data.streaming` to false, or use "
            "a data set with class names",
        )
    largest = 0
    for rows in splits:
        for chunk in rows.select_columns([column]).iter(batch_size=10_000):
            odd = [value for value in chunk[column] if not isinstance(value, int)]
            if odd:
                remedy = "encode it with datasets' class_encode_column"
                raise _label_fault("wrong-column-type", column, f"holds {odd[0]!r}, not a class number; {remedy}")
            largest = max(largest, *chunk[column])
    return largest + 1
