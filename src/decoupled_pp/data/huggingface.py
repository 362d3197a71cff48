"""Opens Hugging Face `datasets`: text or image columns, loaded or streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.extras import import_extra
from decoupled_pp.data.huggingface_labelled import open_image_rows, open_sentence_rows
from decoupled_pp.data.huggingface_text import open_text_rows
from decoupled_pp.data.streams import Rows
from decoupled_pp.settings.sections import HuggingFaceData


def open_huggingface(settings: HuggingFaceData, seed: int) -> Data:
    """Load or stream a data set; text becomes tokens (every row ends with a newline) or sentences, images float32.

    Loaded data are memory-mapped by `datasets`. A stream is shuffled anew each epoch in a buffer of `shuffle_buffer`
    rows; resuming it reads everything before the batch again.
    """
    if settings.streaming and settings.validation_split is None:
        raise UsageError(
            "a stream cannot be split into training and validation; name a `data.validation_split`, or set "
            "`data.streaming` to false",
            code="stream-without-validation",
            key="data.validation_split",
        )
    splits = _load(settings)
    train = _split(splits, settings.train_split, "data.train_split")
    validation = None
    if settings.validation_split is not None:
        validation = _split(splits, settings.validation_split, "data.validation_split")
    for rows in (train, validation):
        if rows is not None:
            _check_columns(rows, settings)
    if settings.image_column is not None:
        return open_image_rows(settings, seed, train, validation)
    if settings.label_column is not None:
        return open_sentence_rows(settings, seed, train, validation)
    return open_text_rows(settings, seed, train, validation)


def _load(settings: HuggingFaceData) -> Any:
    datasets = import_extra("datasets", "data.kind", "huggingface")
    path = str(Path(settings.path).expanduser())
    # The hub's names are "name" or "owner/name"; anything with more slashes can only be a path.
    is_local = settings.path.startswith((".", "/", "~")) or settings.path.count("/") > 1
    if is_local and not Path(path).exists():
        raise UsageError(
            f"`data.path` {settings.path} does not exist; give a folder or a name on the Hugging Face hub",
            code="data-not-loadable",
            key="data.path",
        )
    try:
        return datasets.load_dataset(
            path, name=settings.config, data_files=settings.data_files, streaming=settings.streaming
        )
    except Exception as error:  # whatever a builder or the hub raises, the user's path is what can be changed
        fault = " ".join(str(error).split())[:300]
        raise UsageError(
            f"`data.path` {settings.path!r} cannot be loaded: {type(error).__name__}: {fault}; check it, "
            "`data.config` and `data.data_files`",
            code="data-not-loadable",
            key="data.path",
        ) from error


def _split(splits: Any, name: str, key: str) -> Rows:
    if name not in splits:
        fault = f"`{key}` {name!r} is no split of the data set; it has {', '.join(map(str, splits))}"
        raise UsageError(fault, code="unknown-split", key=key)
    return splits[name]


def _check_columns(rows: Rows, settings: HuggingFaceData) -> None:
    wanted = {"data.text_column": settings.text_column, "data.image_column": settings.image_column}
    if settings.image_column is not None or settings.label_column is not None:
        wanted["data.label_column"] = settings.label_column or "label"
    # A stream may not know its columns before its first row is read.
    names = rows.column_names or list(next(iter(rows), {}))
    for key, name in wanted.items():
        if name is not None and name not in names:
            fault = f"`{key}` {name!r} is no column of the data set; it has {', '.join(names) or 'no rows'}"
            raise UsageError(fault, code="unknown-column", key=key)
