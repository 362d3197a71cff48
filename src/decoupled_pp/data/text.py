"""Opens text files on this machine: the user's own, or the source of Python's standard library."""

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

# Third-party code, and tests and tables that are not like ordinary source.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def open_text(settings: TextData, seed: int) -> Data:
    """Open text files as bytes or through a tokenizer, joined in sorted order without separators."""
    vocabulary = open_vocabulary(settings.tokenizer)
    return _open_files(find_files(settings.files), vocabulary, settings, seed)


def open_python_source(settings: PythonSourceData, seed: int) -> Data:
    """Open the bytes of the standard library's `.py` files; the text depends on the Python version."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = find_python_source(folder)
    if len(files) < 2:
        raise UsageError(
            f"`data.kind` python_source found {len(files)} .py files in {folder}; this Python has no library source, "
            "use kind text with `data.files`",
            code="data-file-missing",
            key="data.kind",
        )
    return _open_files(files, BYTES, settings, seed)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that match the patterns, sorted, each once."""
    files: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        found = [Path(name) for name in glob.glob(expanded, recursive=True)]  # noqa: PTH207 - Path.glob is relative only
        matched = [path for path in found if path.is_file()]
        if not matched:
            raise UsageError(
                f"`data.files` {pattern!r} matches no file (from {Path.cwd()}); check the path",
                code="data-file-missing",
                key="data.files",
            )
        files.update(matched)
    return sorted(files)


def find_python_source(folder: Path) -> list[Path]:
    """Return the `.py` files below a folder, sorted, without packages installed into it and without tests."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # do not even walk into them
        files.extend(Path(parent, name) for name in names if name.endswith(".py"))
    return sorted(path for path in files if path.is_file())


class FileCorpus(Corpus):
    """Files, each a document."""

    def __init__(self, files: Sequence[Path], vocabulary: Vocabulary) -> None:
        self._files = files
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def length(self, documents: Sequence[int]) -> int | None:
        """Return the sum of the file sizes for bytes; None for a tokenizer."""
        if not self._vocabulary.is_bytes:
            return None
        return sum(self._files[document].stat().st_size for document in documents)

    def read(self, documents: Sequence[int]) -> Tensor:
        """Return the tokens of files (N,): of any file as bytes, of UTF-8 files through a tokenizer."""
        contents = (read_bytes(self._files[document]) for document in documents)
        if self._vocabulary.is_bytes:
            return bytes_to_tokens(bytearray().join(contents))
        return self._vocabulary.tokens(
            _decode(content, self._files[document]) for document, content in zip(documents, contents, strict=True)
        )


def read_bytes(path: Path) -> bytes:
    """Return the content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; check the file, or leave it out of `data.files`",
            code="data-file-unreadable",
            key="data.files",
        ) from None


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, or leave out `data.tokenizer` to train on bytes",
            code="data-file-not-utf8",
            key="data.files",
        ) from None


def _open_files(files: list[Path], vocabulary: Vocabulary, settings: TokenSettings, seed: int) -> Data:
    train, validation = split_corpus(FileCorpus(files, vocabulary), settings.validation_fraction, seed)
    return open_tokens(settings, seed, vocabulary, train, validation)
