"""Hugging Face `datasets`: text or image columns, loaded or streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.huggingface_images import open_image_rows
from decoupled_pp.data.huggingface_sentences import open_sentence_rows
from decoupled_pp.data.huggingface_text import open_text_rows
from decoupled_pp.data.streams import Rows
from decoupled_pp.settings.sections import HuggingFaceData


def open_huggingface(settings: HuggingFaceData, seed: int) -> Data:
    """Load or stream a data set; text becomes tokens (every row ends with a newline) or sentences, images float32.

    Loaded data are memory-mapped by `datasets`. A stream is shuffled anew each epoch in a buffer of
    `shuffle_buffer` rows; resuming it reads everything before the batch again.

    Raises:
        UsageError: No such data set, split or column, or the extra `hf` is not installed.
    """
    if settings.streaming and settings.validation_split is None:
        raise UsageError("data.streaming: a stream cannot be split; name a data.validation_split or load the data set")
    splits = _load(settings)
    train = _split(splits, settings.train_split, "train_split")
    validation = None
    if settings.validation_split is not None:
        validation = _split(splits, settings.validation_split, "validation_split")
    for rows in (train, validation):
        if rows is not None:
            _check_columns(rows, settings)
    if settings.image_column is not None:
        return open_image_rows(settings, seed, train, validation)
    if settings.label_column is not None:
        return open_sentence_rows(settings, seed, train, validation)
    return open_text_rows(settings, seed, train, validation)


def _load(settings: HuggingFaceData) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("data.kind: huggingface needs the package datasets; pip install 'decoupled_pp[hf]'") from None
    path = str(Path(settings.path).expanduser())
    is_local = settings.path.startswith((".", "/", "~")) or settings.path.count("/") > 1
    if is_local and not Path(path).exists():
        raise UsageError(f"data.path: {settings.path} does not exist; give a folder or a name on the Hugging Face hub")
    try:
        return datasets.load_dataset(
            path, name=settings.config, data_files=settings.data_files, streaming=settings.streaming
        )
    except Exception as error:  # whatever a builder or the hub raises, the user's path is what can be changed
        fault = " ".join(str(error).split())[:300]
        raise UsageError(
            f"data.path: cannot load {settings.path!r}: {type(error).__name__}: {fault}; "
            "check data.path, data.config and data.data_files"
        ) from error


def _split(splits: Any, name: str, key: str) -> Rows:
    if name not in splits:
        raise UsageError(f"data.{key}: no split {name!r}; the data set has {', '.join(map(str, splits))}")
    return splits[name]


def _check_columns(rows: Rows, settings: HuggingFaceData) -> None:
    wanted = {"text_column": settings.text_column, "image_column": settings.image_column}
    if settings.image_column is not None or settings.label_column is not None:
        wanted["label_column"] = settings.label_column or "label"
    names = rows.column_names or list(next(iter(rows), {}))
    for key, name in wanted.items():
        if name is not None and name not in names:
            raise UsageError(f"data.{key}: no column {name!r}; the data set has {', '.join(names) or 'no rows'}")
