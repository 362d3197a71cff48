"""Reads tokens from the text column of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.masking import masking
from decoupled_pp.data.seeds import Purpose, mixed_seed
from decoupled_pp.data.streams import Rows, Sample, expect_text, shuffled, streamed_data, windows
from decoupled_pp.data.tokens import Corpus, open_tokens, split_corpus, text_part, token_info
from decoupled_pp.data.vocabulary import Vocabulary, open_vocabulary
from decoupled_pp.settings.sections import HuggingFaceData

_ROWS_AT_ONCE = 1000


def _texts(rows: Rows, column: str) -> Iterator[str]:
    """Yield the texts of a column, each ended by a newline: the last word of a row must not run into the next row."""
    for chunk in rows.select_columns([column]).iter(batch_size=_ROWS_AT_ONCE):
        for text in chunk[column]:
            yield f"{expect_text(text, column)}\n"


class RowCorpus(Corpus):
    """The rows of a loaded data set, each a document."""

    def __init__(self, rows: Rows, column: str, vocabulary: Vocabulary) -> None:
        self._rows = rows
        self._column = column
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def read(self, documents: Sequence[int]) -> Tensor:
        """Return the tokens of the rows, (N,)."""
        return self._vocabulary.tokens(_texts(self._rows.select(documents), self._column))


def open_text_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Open the text column of loaded or streamed rows as tokens."""
    vocabulary = open_vocabulary(settings.tokenizer)
    column = settings.text_column or ""
    if settings.streaming:
        return _stream(settings, seed, vocabulary, train, validation)
    corpus = RowCorpus(train, column, vocabulary)
    if not len(corpus):
        raise UsageError(
            f"`data.train_split` {settings.train_split!r} of {settings.path!r} has no rows; name another split",
            code="too-few-rows",
            key="data.train_split",
        )
    if validation is None:
        parts = split_corpus(corpus, settings.validation_fraction, seed)
    else:
        held = RowCorpus(validation, column, vocabulary)
        parts = text_part(corpus, range(len(corpus))), text_part(held, range(len(held)))
    return open_tokens(settings, seed, vocabulary, *parts)


def _stream(settings: HuggingFaceData, seed: int, vocabulary: Vocabulary, train: Rows, validation: Rows) -> Data:
    column = settings.text_column or ""
    context = settings.context

    def samples(rows: Rows, skip: int) -> Iterator[Sample]:
        return windows((vocabulary.tokens([text]) for text in _texts(rows, column)), context, skip)

    def train_epoch(epoch: int) -> Iterator[Sample]:
        return samples(shuffled(train, settings, seed, epoch), mixed_seed(seed, Purpose.OFFSET, epoch) % context)

    info = token_info(settings, vocabulary)
    change = masking(settings, vocabulary)
    return streamed_data(info, settings, train_epoch, lambda _: samples(validation, 0), seed=seed, change=change)
