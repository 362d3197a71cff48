"""Reads sentences and labels from two columns of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.huggingface_labelled import Reader, open_labelled
from decoupled_pp.data.streams import Rows, Sample, expect_text
from decoupled_pp.data.vocabulary import Vocabulary, open_vocabulary
from decoupled_pp.settings.sections import HuggingFaceData


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
    return open_labelled(settings, seed, train, validation, column, lambda _: reader)


class _SentenceReader(Reader):
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
