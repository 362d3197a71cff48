"""Opens rows of a Hugging Face data set that are a sample and its class: images, or sentences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Samples, sampled_data
from decoupled_pp.data.images import image_info
from decoupled_pp.data.splits import random_split
from decoupled_pp.data.streams import Rows, Sample, expect_text, shuffled, stacked, streamed_data
from decoupled_pp.data.vocabulary import Vocabulary, open_vocabulary
from decoupled_pp.settings.sections import HuggingFaceData


class _Reader(ABC):
    """Turns the sample of a row into a tensor, and several into a batch."""

    @abstractmethod
    def info(self, classes: int) -> DataInfo: ...

    @abstractmethod
    def read(self, value: Any) -> Tensor: ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return stacked(samples)


def open_image_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Open images: float32 (C, H, W), grey or RGB as the first image is.

    Values are scaled from 0..255 to -1..1, because the mean of a stream is not known. Images are decoded when their
    batch is taken.
    """
    column = settings.image_column or ""
    return _open_labelled(settings, seed, train, validation, column, lambda first: _ImageReader(first, column))


class _ImageReader(_Reader):
    """Decodes images, and refuses those that do not look like the first."""

    def __init__(self, first: Any, column: str) -> None:
        if not hasattr(first, "convert"):
            raise UsageError(
                f"`data.image_column` {column!r} holds {type(first).__name__}, not images; cast it with datasets.Image",
                code="wrong-column-type",
                key="data.image_column",
            )
        is_grey = first.mode in ("1", "L")
        self._mode = "L" if is_grey else "RGB"
        self._shape = (1 if is_grey else 3, first.height, first.width)

    def info(self, classes: int) -> DataInfo:
        return image_info(self._shape, classes)

    def read(self, value: Any) -> Tensor:
        """Decode a PIL image to (C, H, W)."""
        _, height, width = self._shape
        if (value.height, value.width) != (height, width):
            raise UsageError(
                f"`data.image_column`: an image is {value.width}x{value.height}, the first is {width}x{height}; "
                "resize all images to one size",
                code="images-differ-in-size",
                key="data.image_column",
            )
        values = torch.from_numpy(np.array(value.convert(self._mode), dtype=np.float32))
        return (values.reshape(height, width, -1).permute(2, 0, 1) / 127.5 - 1.0).contiguous()


def open_sentence_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Open sentences: ((ids (B, T), mask (B, T) bool), class (B,)), T the length of the longest sentence of the batch.

    Sentences are tokenised when their batch is taken, with the tokenizer's special tokens, and cut to `context` tokens.
    """
    column = settings.text_column or ""
    vocabulary = open_vocabulary(settings.tokenizer)
    if vocabulary.pad is None:
        raise UsageError(
            f"`data.tokenizer` {settings.tokenizer} has no padding token, which sentences of several lengths need; "
            "give it one (tokenizer.pad_token = ..., save_pretrained)",
            code="no-padding-token",
            key="data.tokenizer",
        )
    reader = _SentenceReader(vocabulary, vocabulary.pad, settings.context, column)
    return _open_labelled(settings, seed, train, validation, column, lambda _: reader)


class _SentenceReader(_Reader):
    """Encodes text, and pads the sentences of a batch to one length."""

    def __init__(self, vocabulary: Vocabulary, pad: int, context: int, column: str) -> None:
        self._vocabulary = vocabulary
        self._pad = pad
        self._context = context
        self._column = column
        self._encode = vocabulary.sentences(context)

    def info(self, classes: int) -> DataInfo:
        return DataInfo("sentences", (self._context,), classes, vocabulary=self._vocabulary.size, pad=self._pad)

    def read(self, value: Any) -> Tensor:
        """Encode text as ids (T,), T at least 1 and at most `context`."""
        return torch.tensor(self._encode(expect_text(value, self._column)) or [self._pad])

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad on the right."""
        ids, labels = zip(*samples, strict=True)
        masks = [torch.ones_like(one, dtype=torch.bool) for one in ids]
        padded = pad_sequence(list(ids), batch_first=True, padding_value=self._pad)
        return (padded, pad_sequence(masks, batch_first=True)), torch.stack(labels)


def _open_labelled(  # noqa: PLR0917 - the settings, the rows, and how to read them
    settings: HuggingFaceData,
    seed: int,
    train: Rows,
    validation: Rows | None,
    column: str,
    make_reader: Callable[[Any], _Reader],
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
    info = reader.info(classes)

    def samples(rows: Rows) -> Iterator[Sample]:
        for row in rows:
            yield reader.read(row[column]), _label(row[labels], classes, labels)

    if settings.streaming:

        def train_epoch(epoch: int) -> Iterator[Sample]:
            return samples(shuffled(train, settings, seed, epoch))

        return streamed_data(info, settings, train_epoch, lambda _: samples(validation), collate=reader.collate)
    if validation is None:
        kept, held = random_split(len(train), settings.validation_fraction, seed)
        validation = train.select(held)
        train = train.select(kept)

    def loaded(rows: Rows) -> Samples:
        return _LoadedRows(rows, lambda chosen: reader.collate(list(samples(chosen))))

    return sampled_data(info, settings, seed, lambda: loaded(train), lambda: loaded(validation))


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
