"""Turns text into token ids and back: bytes, a Hugging Face tokenizer, or GPT-2's two files."""

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
from decoupled_pp.core.extras import import_extra

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
GPT2_FILES = ("encoder.json", "vocab.bpe")


@dataclass(frozen=True)
class Vocabulary:
    """A mapping between text and token ids."""

    size: int  # largest id + 1
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]  # bytes that are not valid UTF-8 become U+FFFD
    sentences: Callable[[int], Callable[[str], list[int]]]  # longest length -> (text -> ids with special tokens)
    is_bytes: bool = False  # ids are the bytes of the text, so that files need no encoding at all
    mask: int | None = None  # id that stands for a masked token
    pad: int | None = None  # id that fills up short sentences
    definition: str | None = None  # content of a tokenizer.json that gives this vocabulary; bytes need none

    def tokens(self, texts: Iterable[str]) -> Tensor:
        """Return all ids of the texts in a row, (N,): uint8 for bytes, else int32; a batch is cast when it is taken."""
        if self.is_bytes:
            return bytes_to_tokens(bytearray().join(text.encode("utf-8") for text in texts))
        parts = [np.asarray(self.encode(text), dtype=np.int32) for text in texts]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *parts]))


def bytes_to_tokens(content: bytearray) -> Tensor:
    """Return the bytes as a uint8 tensor (N,) that shares their memory."""
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
    """Open the vocabulary of a `tokenizer` setting: None is bytes.

    Special tokens, truncation and padding that a tokenizer may ask for are not applied to a stream of text.
    """
    if tokenizer is None:
        return BYTES
    path = Path(tokenizer).expanduser()
    if not path.exists() and not _HUB_NAME.fullmatch(tokenizer):
        raise _fault(
            "tokenizer-not-found",
            f"{tokenizer} does not exist; give a tokenizer.json, a model's folder or GPT-2's files",
        )
    tokenizers = import_extra("tokenizers", "data.tokenizer", tokenizer)
    if path.is_dir() and not any((path / name).is_file() for name in (*GPT2_FILES, *_MODEL_FILES)):
        raise _fault(
            "tokenizer-not-found",
            f"{tokenizer} is a folder without tokenizer.json, and without encoder.json and vocab.bpe; give the folder "
            "of a model, or of GPT-2's two files",
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise _fault("tokenizer-unusable", f"{tokenizer} is neither a file nor a folder; give a tokenizer.json")
    try:
        if path.is_file():
            return _as_vocabulary(tokenizers.Tokenizer.from_file(str(path)))
        if all((path / name).is_file() for name in GPT2_FILES):
            return _as_vocabulary(_gpt2_tokenizer(path))
        return _model_vocabulary(str(path) if path.is_dir() else tokenizer)
    except UsageError:
        raise
    except Exception as error:  # the Rust side raises bare Exception, the hub whatever it likes
        fault = " ".join(str(error).split())[:300]
        code = "tokenizer-unusable" if path.exists() else "tokenizer-not-found"
        reason = "is not a usable tokenizer" if path.exists() else "does not exist here, and the hub gives none"
        raise _fault(code, f"{tokenizer} {reason}: {fault}") from None


def _fault(code: str, fault: str) -> UsageError:
    return UsageError(f"`data.tokenizer` {fault}", code=code, key="data.tokenizer")


def _model_vocabulary(name: str) -> Vocabulary:
    """Load the tokenizer of a model of `transformers`, by folder or hub name."""
    loaded = import_extra("transformers", "data.tokenizer", name).AutoTokenizer.from_pretrained(name)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise _fault("tokenizer-unusable", f"{name} is not backed by the package tokenizers; give a tokenizer.json")
    return _as_vocabulary(backend, loaded.mask_token_id, loaded.pad_token_id)


def _gpt2_tokenizer(folder: Path) -> Any:
    """Build GPT-2's byte-level byte-pair encoding (Radford et al. 2019, section 2.2) from its published files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = (str(folder / name) for name in GPT2_FILES)
    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    lacking = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - tokenizer.get_vocab().keys())
    if lacking:  # the tokenizer would drop these bytes silently
        raise _fault(
            "tokenizer-unusable",
            f"{vocabulary} lacks {len(lacking)} of the 256 byte symbols ({lacking[0]!r} ...), so text would be lost; "
            "use GPT-2's own file",
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _as_vocabulary(tokenizer: Any, mask: int | None = None, pad: int | None = None) -> Vocabulary:
    """Return the vocabulary of a tokenizer of the package `tokenizers`; its truncation and padding are switched off."""
    padding = tokenizer.padding or {}
    definition = tokenizer.to_str()
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def sentences(length: int) -> Callable[[str], list[int]]:
        # Truncation is a state of the tokenizer: sentences get one of their own, the stream of text keeps the other.
        own = type(tokenizer).from_str(definition)
        own.no_padding()
        own.enable_truncation(length, direction=(own.truncation or {}).get("direction", "right"))
        if own.num_special_tokens_to_add(False) >= length:
            raise UsageError(
                f"`data.context` {length} leaves no room beside the tokenizer's special tokens; raise it",
                code="context-too-small",
                key="data.context",
            )
        return lambda sentence: list(own.encode(sentence).ids)

    def known(*names: str) -> int | None:
        ids = (tokenizer.token_to_id(name) for name in names)
        return next((found for found in ids if found is not None), None)

    if mask is None:
        mask = known("[MASK]", "<mask>")
    if pad is None:
        pad = padding.get("pad_id", known("[PAD]", "<pad>"))
    size = max(tokenizer.get_vocab().values()) + 1
    return Vocabulary(size, encode, decode, sentences, mask=mask, pad=pad, definition=definition)
