"""Text to token ids and back: bytes, a Hugging Face tokenizer file, or GPT-2's two files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoupled_pp.contracts import UsageError

GPT2_FILES = ("encoder.json", "vocab.bpe")


@dataclass(frozen=True)
class Vocabulary:
    """A mapping between text and token ids.

    Attributes:
        size: Number of ids (largest id + 1).
        encode: Text -> ids.
        decode: Ids -> text; what is not valid UTF-8 becomes U+FFFD.
        is_bytes: Whether ids are the bytes of the text, so that files need no encoding at all.
    """

    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    is_bytes: bool = False

    def tokens(self, texts: Iterable[str]) -> Tensor:
        """All ids of the texts in a row, (N,): uint8 for bytes, else int32; a batch is cast when it is taken."""
        if self.is_bytes:
            return bytes_to_tokens(bytearray().join(text.encode("utf-8") for text in texts))
        parts = [np.asarray(self.encode(text), dtype=np.int32) for text in texts]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *parts]))


def bytes_to_tokens(content: bytearray) -> Tensor:
    """The bytes as a uint8 tensor (N,), not copied."""
    if not content:
        return torch.empty(0, dtype=torch.uint8)  # frombuffer refuses an empty buffer
    return torch.frombuffer(content, dtype=torch.uint8)


BYTES = Vocabulary(
    size=256,
    encode=lambda text: list(text.encode("utf-8")),
    decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    is_bytes=True,
)


def open_vocabulary(tokenizer: str | None) -> Vocabulary:
    """The vocabulary of a `tokenizer` setting: None is bytes.

    Special tokens, truncation and padding that a tokenizer file may ask for are not applied: the text is one stream.

    Raises:
        UsageError: The extra `hf` is not installed, or the file or folder cannot be used.
    """
    if tokenizer is None:
        return BYTES
    path = Path(tokenizer).expanduser()
    if not path.exists():
        raise UsageError(f"data.tokenizer: {tokenizer} does not exist; give a tokenizer.json or GPT-2's folder")
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            f"data.tokenizer: {tokenizer} needs the package tokenizers; pip install 'decoupled_pp[hf]'"
        ) from None
    missing = [name for name in GPT2_FILES if path.is_dir() and not (path / name).is_file()]
    if missing:
        raise UsageError(
            f"data.tokenizer: folder {tokenizer} has no {' and no '.join(missing)}; "
            "give a folder with GPT-2's two files, or a tokenizer.json"
        )
    try:
        loaded = _gpt2(path) if path.is_dir() else tokenizers.Tokenizer.from_file(str(path))
    except UsageError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        fault = " ".join(str(error).split())
        raise UsageError(f"data.tokenizer: {tokenizer} is not a usable tokenizer: {fault}") from None
    return _vocabulary(loaded)


def _gpt2(folder: Path) -> Any:
    """GPT-2's byte-level byte-pair encoding (Radford et al. 2019, section 2.2) from its published files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = (str(folder / name) for name in GPT2_FILES)
    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    lacking = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - tokenizer.get_vocab().keys())
    if lacking:  # the model would drop these bytes without a word
        raise UsageError(
            f"data.tokenizer: {vocabulary} lacks {len(lacking)} of the 256 byte symbols ({lacking[0]!r} ...), so text "
            "would be lost; use GPT-2's own file"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary(tokenizer: Any) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return Vocabulary(max(tokenizer.get_vocab().values()) + 1, encode, decode)
