"""Images and labels from two columns of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoupled_pp.contracts import Batch, Data, UsageError
from decoupled_pp.data.batches import Samples, TrainingBatches, ValidationBatches
from decoupled_pp.data.images import image_info
from decoupled_pp.data.splits import random_split
from decoupled_pp.data.streams import Rows, Sample, shuffled, stream_sources
from decoupled_pp.sections import HuggingFaceData


def open_image_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Image data: float32 (C, H, W) scaled from 0..255 to -1..1 (a stream has no mean), grey or RGB as the first image.

    Images are decoded when their batch is taken.

    Raises:
        UsageError: A column does not hold images or class numbers, or the images differ in size.
    """
    train = train.select_columns([settings.image_column, settings.label_column])
    if validation is not None:
        validation = validation.select_columns([settings.image_column, settings.label_column])
    first = next(iter(train), None)
    if first is None or (not settings.streaming and validation is None and len(train) < 2):
        raise UsageError(f"data.train_split: {settings.train_split!r} of {settings.path!r} has fewer than 2 rows")
    classes = _count_classes([rows for rows in (train, validation) if rows is not None], settings)
    reader = _Reader(first[settings.image_column], classes, settings)
    info = image_info(reader.shape, classes)
    if settings.streaming:

        def train_epoch(epoch: int) -> Iterator[Sample]:
            return reader.samples(shuffled(train, settings, seed, epoch))

        return Data(info=info, **stream_sources(settings, train_epoch, lambda _: reader.samples(validation)))
    if validation is None:
        kept, held = random_split(len(train), settings.validation_fraction, seed)
        train, validation = train.select(kept), train.select(held)
    return Data(
        info=info,
        train=TrainingBatches(lambda: _RowImages(train, reader), settings.batch_size, seed),
        validation=ValidationBatches(
            lambda: _RowImages(validation, reader), settings.validation_batch_size or settings.batch_size
        ),
    )


class _Reader:
    """Turns rows into tensors and refuses what does not look like the first row."""

    def __init__(self, first: Any, classes: int, settings: HuggingFaceData) -> None:
        self._image_column = settings.image_column or ""
        self._label_column = settings.label_column
        self._classes = classes
        if not hasattr(first, "convert"):
            raise UsageError(
                f"data.image_column: column {self._image_column!r} holds {type(first).__name__}, not images; "
                "cast it with datasets.Image"
            )
        self._mode = "L" if first.mode in ("1", "L") else "RGB"
        self.shape = (1 if self._mode == "L" else 3, first.height, first.width)

    def image(self, picture: Any) -> Tensor:
        """PIL image -> (C, H, W)."""
        _, height, width = self.shape
        if (picture.height, picture.width) != (height, width):
            raise UsageError(
                f"data.image_column: an image is {picture.width}x{picture.height}, the first is {width}x{height}; "
                "resize all images to one size"
            )
        values = torch.from_numpy(np.array(picture.convert(self._mode), dtype=np.float32))
        return (values.reshape(height, width, -1).permute(2, 0, 1) / 127.5 - 1.0).contiguous()

    def label(self, value: int) -> Tensor:
        """Class number -> int64 scalar."""
        if not 0 <= value < self._classes:  # the hub marks unlabelled test rows with -1
            raise UsageError(
                f"data.label_column: {self._label_column!r} holds {value}, not a class of 0..{self._classes - 1}; "
                "use a split with labels"
            )
        return torch.tensor(value)

    def samples(self, rows: Rows) -> Iterator[Sample]:
        """The rows of a stream in order."""
        for row in rows:
            yield self.image(row[self._image_column]), self.label(row[self._label_column])

    def batch(self, rows: dict[str, list[Any]]) -> Batch:
        """Images (B, C, H, W) and labels (B,)."""
        images = [self.image(picture) for picture in rows[self._image_column]]
        return torch.stack(images), torch.stack([self.label(value) for value in rows[self._label_column]])


class _RowImages(Samples):
    """The rows of a loaded data set, decoded when taken."""

    def __init__(self, rows: Rows, reader: _Reader) -> None:
        self._rows = rows
        self._reader = reader

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Tensor, epoch: int | None) -> Batch:
        return self._reader.batch(self._rows[indices.tolist()])


def _count_classes(splits: list[Rows], settings: HuggingFaceData) -> int:
    """From the ClassLabel feature, else the largest label of all rows + 1."""
    column = settings.label_column
    names = getattr((splits[0].features or {}).get(column), "num_classes", None)
    if names is not None:
        return int(names)
    if settings.streaming:
        raise UsageError(
            f"data.label_column: {column!r} is no ClassLabel, so a stream does not tell the number of classes; "
            "set streaming: false or use a data set with class names"
        )
    largest = 0
    for rows in splits:
        for chunk in rows.select_columns([column]).iter(batch_size=10_000):
            odd = [value for value in chunk[column] if not isinstance(value, int)]
            if odd:
                raise UsageError(
                    f"data.label_column: {column!r} holds {odd[0]!r}, not a class number; "
                    "encode it with datasets' class_encode_column"
                )
            largest = max(largest, *chunk[column])
    return largest + 1
