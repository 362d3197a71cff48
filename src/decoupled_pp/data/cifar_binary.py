"""Reads CIFAR-10 in its official binary form: records of 1 label byte and 3072 pixel bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.images import Pixels, image_info, open_pixels
from decoupled_pp.settings.sections import CifarBinaryData

SHAPE = (3, 32, 32)
CLASSES = 10
RECORD = 1 + 3 * 32 * 32
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)


def open_cifar_binary(settings: CifarBinaryData, seed: int) -> Data:
    """Open images (3, 32, 32) of 10 classes, normalised per channel with the training images' mean and deviation."""
    folder = Path(settings.folder).expanduser()
    for name in TRAIN_FILES + TEST_FILES:
        check_records(folder / name)
    return open_pixels(
        image_info(SHAPE, CLASSES),
        lambda: (read_records(folder, TRAIN_FILES), read_records(folder, TEST_FILES)),
        settings,
        seed,
        settings.augment,
    )


def check_records(path: Path) -> None:
    """Check that a file holds CIFAR-10 records, without keeping it."""
    if not path.is_file():
        raise UsageError(
            f"`data.folder`: {path} is missing; name the folder with data_batch_1.bin .. data_batch_5.bin and "
            "test_batch.bin (docs/data.md: where to get them)",
            code="data-file-missing",
            key="data.folder",
        )
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        raise UsageError(
            f"{path} is truncated or not CIFAR-10: {size} bytes are not a whole number of {RECORD}-byte records; "
            "fetch it again",
            code="data-file-damaged",
            key="data.folder",
        )
    # A memory map reads the pages with labels as they are needed; the pixels are not kept.
    labels = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, RECORD)[:, 0]
    if labels.max() >= CLASSES:
        record = int(labels.argmax())
        raise UsageError(
            f"{path} is not CIFAR-10: record {record} has label {labels[record]}, the largest possible is "
            f"{CLASSES - 1}; fetch it again",
            code="data-file-damaged",
            key="data.folder",
        )


def read_records(folder: Path, names: tuple[str, ...]) -> Pixels:
    """Return the records of the files in order."""
    parts = [np.fromfile(folder / name, dtype=np.uint8).reshape(-1, RECORD) for name in names]
    records = torch.from_numpy(np.concatenate(parts))
    return Pixels(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].long())
