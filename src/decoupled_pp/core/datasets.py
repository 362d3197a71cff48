"""Data sets: seeded micro-batches, and what a model may know about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from decoupled_pp.core.packets import Batch


class BatchSource(ABC):
    """A deterministic, resumable stream of micro-batches."""

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield micro-batches from number `start` on; the same number is always the same micro-batch."""


@dataclass(frozen=True)
class DataInfo:
    """Describes the data to a model or an example.

    Attributes:
        form: "image" (B, C, H, W float), "vector" (B, D float), "tokens" (B, T int64, next-token targets),
            "masked_tokens" (B, T int64, targets where tokens are masked, IGNORED elsewhere), "sentences" (ids (B, T),
            bool mask (B, T), class targets) or "other".
        shape: Shape of one sample without the batch dimension; for sentences, the longest one.
        outputs: Number of classes or size of the vocabulary.
        encode: For text, string -> token ids.
        decode: For text, token ids -> string.
        vocabulary: For sentences, the size of the vocabulary.
        pad: For sentences, the id of padding.
    """

    form: str
    shape: tuple[int, ...]
    outputs: int
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[list[int]], str] | None = None
    vocabulary: int | None = None
    pad: int | None = None

    def known(self) -> dict[str, Any]:
        """Return all fields but the functions, as JSON."""
        known = {"form": self.form, "shape": list(self.shape), "outputs": self.outputs}
        return {**known, "vocabulary": self.vocabulary, "pad": self.pad}

    @staticmethod
    def of(known: dict[str, Any]) -> DataInfo:
        """Return the info that `known` described; it can neither encode nor decode."""
        more = {key: known.get(key) for key in ("vocabulary", "pad")}
        return DataInfo(known["form"], tuple(known["shape"]), known["outputs"], **more)


@dataclass(frozen=True)
class Data:
    """A data set ready to train on: seeded, shuffled training micro-batches and a fixed validation pass."""

    info: DataInfo
    train: BatchSource
    validation: BatchSource
