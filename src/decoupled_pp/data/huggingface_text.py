"""Tokens from the text column of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.masking import masking
from decoupled_pp.data.seeds import Purpose, mixed_seed
from decoupled_pp.data.streams import Rows, Sample, shuffled, stream_sources, windows
from decoupled_pp.data.tokens import Corpus, open_tokens, split_corpus, token_info, whole
from decoupled_pp.data.vocabulary import Vocabulary, open_vocabulary
from decoupled_pp.settings.sections import HuggingFaceData

_ROWS_AT_ONCE = 1000


def _texts(rows: Rows, column: str) -> Iterator[str]:
    """The texts of a column, each ended by a newline (or the last word of a row would run into the next row)."""
    for chunk in rows.select_columns([column]).iter(batch_size=_ROWS_AT_ONCE):
        for text in chunk[column]:
            if not isinstance(text, str):
                raise UsageError(f"data.text_column: column {column!r} holds {type(text).__name__}, not text")
            yield f"{text}\n"


class RowCorpus(Corpus):
    """Every row of a loaded data set is one document."""

    def __init__(self, rows: Rows, column: str, vocabulary: Vocabulary) -> None:
        self._rows = rows
        self._column = column
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def read(self, documents: Sequence[int]) -> Tensor:
        """The tokens of the rows, (N,)."""
        return self._vocabulary.tokens(_texts(self._rows.select(documents), self._column))


def open_text_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Token data over the text column of loaded or streamed rows.

    Raises:
        UsageError: The tokenizer is not usable or there are no rows.
    """
    vocabulary = open_vocabulary(settings.tokenizer)
    column = settings.text_column or ""
    if settings.streaming:
        return _stream(settings, seed, vocabulary, train, validation)
    corpus = RowCorpus(train, column, vocabulary)
    if not len(corpus):
        raise UsageError(f"data.train_split: {settings.train_split!r} of {settings.path!r} has no rows")
    if validation is None:
        parts = split_corpus(corpus, settings.validation_fraction, seed)
    else:
        parts = whole(corpus), whole(RowCorpus(validation, column, vocabulary))
    return open_tokens(settings, seed, vocabulary, *parts)


def _stream(settings: HuggingFaceData, seed: int, vocabulary: Vocabulary, train: Rows, validation: Rows) -> Data:
    column, context, change = settings.text_column or "", settings.context, masking(settings, vocabulary)

    def samples(rows: Rows, skip: int) -> Iterator[Sample]:
        return windows((vocabulary.tokens([text]) for text in _texts(rows, column)), context, skip)

    def train_epoch(epoch: int) -> Iterator[Sample]:
        return samples(shuffled(train, settings, seed, epoch), mixed_seed(seed, Purpose.OFFSET, epoch) % context)

    return Data(
        info=token_info(settings, vocabulary),
        **stream_sources(settings, train_epoch, lambda _: samples(validation, 0), seed=seed, change=change),
    )
