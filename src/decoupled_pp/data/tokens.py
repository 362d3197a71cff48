"""Cuts long texts into next-token samples, and splits a corpus into training and held-out text.

One epoch of training windows, `context` = 4, offset drawn per epoch from 0..3 (y is x shifted by 1):

    tokens   a b c d e f g h i j k l m n
    offset 2     [x x x x]                 y = d e f g ... shares only its last token with the next window's x
                         [x x x x]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.batches import Samples, sampled_data
from decoupled_pp.data.masking import masking
from decoupled_pp.data.seeds import Purpose, mixed_seed
from decoupled_pp.data.splits import random_split
from decoupled_pp.data.vocabulary import Vocabulary
from decoupled_pp.settings.sections import TokenSettings


class TokenWindows(Samples):
    """Windows of `context` tokens that do not overlap within an epoch; all epochs have the same number of windows."""

    def __init__(self, tokens: Tensor, context: int, seed: int | None, part: str) -> None:
        """Window ids (N,) of any integer type; `seed` is None for validation, which has no offset."""
        check_length(len(tokens), context, part)
        self._tokens = tokens
        self._context = context
        self._seed = seed
        # Training leaves room for every offset below `context` (unless the text is too short to lose a window).
        room = len(tokens) - (1 if seed is None else context)
        self._count = max(room // context, 1)
        self._offsets = min(context, len(tokens) - self._count * context)

    def __len__(self) -> int:
        """Return the number of windows."""
        return self._count

    def offset(self, epoch: int | None) -> int:
        """Return how many tokens an epoch skips at its start."""
        if epoch is None or self._seed is None:
            return 0
        return mixed_seed(self._seed, Purpose.OFFSET, epoch) % self._offsets

    def take(self, indices: Tensor, epoch: int | None) -> Batch:
        """Return inputs and next tokens, both (B, context) int64."""
        first = self.offset(epoch) + indices * self._context
        # One gather for the batch; the tokens stay bytes or int32 in memory and are cast here.
        windows = self._tokens[first[:, None] + torch.arange(self._context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def check_length(tokens: int, context: int, part: str) -> None:
    """Raise UsageError unless `tokens` fill one window and its next token."""
    if tokens <= context:
        raise UsageError(
            f"the {part} text has {tokens} tokens, fewer than one sample of `data.context` {context} + 1; "
            "give more text, a smaller `data.context` or another `data.validation_fraction`",
            code="too-little-data",
            key="data.context",
        )


class Corpus(ABC):
    """Documents that can be read as tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of documents."""

    @abstractmethod
    def read(self, documents: Sequence[int]) -> Tensor:
        """Return the tokens of these documents in a row, (N,)."""

    def length(self, documents: Sequence[int]) -> int | None:
        """Return the number of tokens of these documents, or None if that is not known without reading."""
        return None


@dataclass(frozen=True)
class TextPart:
    """Training or held-out text."""

    read: Callable[[], Tensor]  # reads the token ids (N,)
    length: int | None = None  # their number, if known without reading


def text_part(corpus: Corpus, documents: Sequence[int]) -> TextPart:
    """Return some documents of a corpus as one text."""
    return TextPart(lambda: corpus.read(documents), corpus.length(documents))


def split_corpus(corpus: Corpus, fraction: float, seed: int) -> tuple[TextPart, TextPart]:
    """Split into training and held-out text by documents (a seeded choice); a single document has its tail held out."""
    if len(corpus) == 1:
        return _split_tail(corpus, fraction)
    train, held = random_split(len(corpus), fraction, seed)
    return text_part(corpus, train), text_part(corpus, held)


def _split_tail(corpus: Corpus, fraction: float) -> tuple[TextPart, TextPart]:
    read = cache(lambda: corpus.read([0]))  # both parts share one reading

    def kept(length: int) -> int:
        return length - round(fraction * length)

    def head() -> Tensor:
        return read()[: kept(len(read()))]

    def tail() -> Tensor:
        return read()[kept(len(read())) :]

    length = corpus.length([0])
    if length is None:
        return TextPart(head), TextPart(tail)
    return TextPart(head, kept(length)), TextPart(tail, length - kept(length))


def token_info(settings: TokenSettings, vocabulary: Vocabulary) -> DataInfo:
    """Return the facts about a token data set."""
    if settings.target == "masked_tokens":  # such a model cannot continue a text, so no encode and decode
        return DataInfo("masked_tokens", (settings.context,), vocabulary.size)
    return DataInfo("tokens", (settings.context,), vocabulary.size, vocabulary.encode, vocabulary.decode)


def open_tokens(
    settings: TokenSettings, seed: int, vocabulary: Vocabulary, train: TextPart, validation: TextPart
) -> Data:
    """Open two texts; each is read when its source is first iterated."""
    context = settings.context
    change = masking(settings, vocabulary)
    for name, part in (("training", train), ("validation", validation)):
        if part.length is not None:
            check_length(part.length, context, name)
    return sampled_data(
        token_info(settings, vocabulary),
        settings,
        seed,
        cache(lambda: TokenWindows(train.read(), context, seed, "training")),
        cache(lambda: TokenWindows(validation.read(), context, None, "validation")),
        change,
        change,
    )
