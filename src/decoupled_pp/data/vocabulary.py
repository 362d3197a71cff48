"""Text to token ids and back: bytes, a Hugging Face tokenizer, or GPT-2's two files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoupled_pp.core.errors import UsageError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
GPT2_FILES = ("encoder.json", "vocab.bpe")


@dataclass(frozen=True)
class Vocabulary:
    """A mapping between text and token ids.

    Attributes:
        size: Number of ids (largest id + 1).
        encode: Text -> ids.
        decode: Ids -> text; what is not valid UTF-8 becomes U+FFFD.
        sentences: Longest length -> (text -> ids of a sentence, special tokens included).
        is_bytes: Whether ids are the bytes of the text, so that files need no encoding at all.
        mask: Id that stands for a masked token; None: there is none.
        pad: Id that fills up short sentences; None: there is none.
    """

    size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    sentences: Callable[[int], Callable[[str], list[int]]]
    is_bytes: bool = False
    mask: int | None = None
    pad: int | None = None

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
    pad=0,
    sentences=lambda length: lambda text: list(text.encode("utf-8")[:length]),
)


def open_vocabulary(tokenizer: str | None) -> Vocabulary:
    """The vocabulary of a `tokenizer` setting: None is bytes.

    Special tokens, truncation and padding that a tokenizer may ask for are not applied to a stream of text.

    Raises:
        UsageError: The extra `hf` is not installed, or the file or folder cannot be used.
    """
    if tokenizer is None:
        return BYTES
    path = Path(tokenizer).expanduser()
    if not path.exists() and not _HUB_NAME.fullmatch(tokenizer):
        raise UsageError(
            f"data.tokenizer: {tokenizer} does not exist; give a tokenizer.json, a model's folder or GPT-2's files"
        )
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            f"data.tokenizer: {tokenizer} needs the package tokenizers; pip install 'decoupled_pp[hf]'"
        ) from None
    if path.is_dir() and not any((path / name).is_file() for name in (*GPT2_FILES, *_MODEL_FILES)):
        raise UsageError(
            f"data.tokenizer: folder {tokenizer} has no tokenizer.json, and no encoder.json and vocab.bpe; "
            "give the folder of a model, or of GPT-2's two files"
        )
    try:
        if path.is_file():
            return _vocabulary(tokenizers.Tokenizer.from_file(str(path)))
        if all((path / name).is_file() for name in GPT2_FILES):
            return _vocabulary(_gpt2(path))
        return _of_a_model(str(path) if path.is_dir() else tokenizer)
    except UsageError:
        raise
    except Exception as error:  # the Rust side raises bare Exception, the hub whatever it likes
        fault = " ".join(str(error).split())[:300]
        where = "is not a usable tokenizer" if path.exists() else "does not exist here, and the hub gives none"
        raise UsageError(f"data.tokenizer: {tokenizer} {where}: {fault}") from None


def _of_a_model(name: str) -> Vocabulary:
    """The tokenizer that goes with a model of `transformers`, by folder or hub name."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(
            f"data.tokenizer: {name} needs the package transformers; pip install 'decoupled_pp[hf]'"
        ) from None
    loaded = AutoTokenizer.from_pretrained(name)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"data.tokenizer: {name} is not backed by the package tokenizers; give a tokenizer.json")
    return _vocabulary(backend, loaded.mask_token_id, loaded.pad_token_id)


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


def _vocabulary(tokenizer: Any, mask: int | None = None, pad: int | None = None) -> Vocabulary:
    """Its special tokens are known by their usual names where nothing else says which they are."""
    padding = tokenizer.padding or {}
    text = tokenizer.to_str()
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def sentences(length: int) -> Callable[[str], list[int]]:
        own = type(tokenizer).from_str(text)
        own.no_padding()
        own.enable_truncation(length, direction=(own.truncation or {}).get("direction", "right"))
        if own.num_special_tokens_to_add(False) >= length:
            raise UsageError(f"data.context {length} leaves no room beside the tokenizer's special tokens; raise it")
        return lambda sentence: list(own.encode(sentence).ids)

    def known(*names: str) -> int | None:
        found = (tokenizer.token_to_id(name) for name in names)
        return next((one for one in found if one is not None), None)

    return Vocabulary(
        max(tokenizer.get_vocab().values()) + 1,
        encode,
        decode,
        sentences,
        mask=known("[MASK]", "<mask>") if mask is None else mask,
        pad=padding.get("pad_id", known("[PAD]", "<pad>")) if pad is None else pad,
    )
