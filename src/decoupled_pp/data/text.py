"""Text files on this machine: the user's own, or the source of Python's standard library."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.tokens import Corpus, open_tokens, split_corpus
from decoupled_pp.data.vocabulary import BYTES, Vocabulary, bytes_to_tokens, open_vocabulary
from decoupled_pp.settings.sections import PythonSourceData, TextData, TokenSettings

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
"""Third-party code, and tests and tables that are not like ordinary source."""


def open_text(settings: TextData, seed: int) -> Data:
    """Text files as bytes or through a tokenizer, joined in sorted order without separators.

    Raises:
        UsageError: A pattern matches no file, a file is unreadable, or there is less text than one sample.
    """
    vocabulary = open_vocabulary(settings.tokenizer)
    return _open_files(find_files(settings.files), vocabulary, settings, seed)


def open_python_source(settings: PythonSourceData, seed: int) -> Data:
    """The bytes of the standard library's `.py` files; which text that is depends on the Python version.

    Raises:
        UsageError: The standard library of this Python is not there as source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = find_python_source(folder)
    if len(files) < 2:
        raise UsageError(
            f"data.kind: python_source found {len(files)} .py files in {folder}; this Python has no library source, "
            "use data.kind 'text' with data.files"
        )
    return _open_files(files, BYTES, settings, seed)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that match the patterns, sorted, each once.

    Raises:
        UsageError: A pattern matches none.
    """
    files: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        found = [Path(name) for name in glob.glob(expanded, recursive=True)]  # noqa: PTH207 - Path.glob is relative only
        matched = [path for path in found if path.is_file()]
        if not matched:
            raise UsageError(f"data.files: {pattern!r} matches no file (from {Path.cwd()}); check the path")
        files.update(matched)
    return sorted(files)


def find_python_source(folder: Path) -> list[Path]:
    """The `.py` files below a folder, without packages installed into it and without tests, sorted."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # do not even walk into them
        files.extend(Path(parent, name) for name in names if name.endswith(".py"))
    return sorted(path for path in files if path.is_file())


class FileCorpus(Corpus):
    """Every file is one document."""

    def __init__(self, files: Sequence[Path], vocabulary: Vocabulary) -> None:
        self._files = files
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def length(self, documents: Sequence[int]) -> int | None:
        """For bytes the sum of the file sizes."""
        if not self._vocabulary.is_bytes:
            return None
        return sum(self._files[document].stat().st_size for document in documents)

    def read(self, documents: Sequence[int]) -> Tensor:
        """Bytes are not decoded, so any file will do; for a tokenizer the files must be UTF-8."""
        contents = (read_bytes(self._files[document]) for document in documents)
        if self._vocabulary.is_bytes:
            return bytes_to_tokens(bytearray().join(contents))
        return self._vocabulary.tokens(
            _decode(content, self._files[document]) for document, content in zip(documents, contents, strict=True)
        )


def read_bytes(path: Path) -> bytes:
    """The content of a file, or UsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; check the file or leave it out of data.files"
        ) from None


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, or leave out data.tokenizer to train on bytes"
        ) from None


def _open_files(files: list[Path], vocabulary: Vocabulary, settings: TokenSettings, seed: int) -> Data:
    train, validation = split_corpus(FileCorpus(files, vocabulary), settings.validation_fraction, seed)
    return open_tokens(settings, seed, vocabulary, train, validation)
