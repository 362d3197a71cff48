"""Reads MNIST-like data sets: the IDX format of http://yann.lecun.com/exdb/mnist, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from decoupled_pp.core.datasets import Data
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.images import Pixels, image_info, open_pixels
from decoupled_pp.settings.sections import IdxData

_CHUNK = 1 << 20


def open_idx(settings: IdxData, seed: int) -> Data:
    """Open images (1, H, W), normalised with the mean and deviation of all training pixels.

    There are as many classes as the largest label + 1. All four files are read through once (not kept), so a damaged
    file is found before training starts.
    """
    folder = Path(settings.folder).expanduser()
    train = _ImagesAndLabels(folder, "train")
    test = _ImagesAndLabels(folder, "t10k")
    if train.shape != test.shape:
        raise _of_several_sets(f"{test.images} has images of {test.shape}, {train.images} of {train.shape}")
    classes = max(train.classes, test.classes)
    info = image_info((1, *train.shape), classes)
    return open_pixels(info, lambda: (train.read(), test.read()), settings, seed, settings.augment)


def _of_several_sets(fault: str) -> UsageError:
    return UsageError(
        f"{fault}; put the files of one data set into `data.folder`", code="data-files-disagree", key="data.folder"
    )


def _damaged(fault: str) -> UsageError:
    return UsageError(f"{fault}; fetch it again", code="data-file-damaged", key="data.folder")


class _ImagesAndLabels:
    """One file of images and its file of labels, checked."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.images = find_file(folder, f"{prefix}-images-idx3-ubyte")
        self.labels = find_file(folder, f"{prefix}-labels-idx1-ubyte")
        count, height, width = check_idx(self.images, 3)
        (label_count,) = check_idx(self.labels, 1)
        if count != label_count:
            raise _of_several_sets(f"{self.images} has {count} images but {self.labels} {label_count} labels")
        self.shape = (height, width)
        self.classes = int(read_idx(self.labels).max()) + 1

    def read(self) -> Pixels:
        """Read both files."""
        return Pixels(read_idx(self.images)[:, None], read_idx(self.labels).long())


def find_file(folder: Path, name: str) -> Path:
    """Return the file `name` or `name.gz` in `folder`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(
        f"`data.folder` {folder} has neither {name} nor {name}.gz; name the folder with the four IDX files "
        "(docs/data.md: where to get them)",
        code="data-file-missing",
        key="data.folder",
    )


def check_idx(path: Path, rank: int) -> tuple[int, ...]:
    """Read a file of unsigned bytes through without keeping it, and return its `rank` dimensions."""
    found = 0
    header = 4 + 4 * rank
    try:
        with _open(path) as stream:
            dimensions = _header(path, stream.read(header), rank)
            expected = header + math.prod(dimensions)
            found = header
            while chunk := stream.read(_CHUNK):
                found += len(chunk)
    except EOFError:
        place = f"after about {found} of {expected} bytes" if found else "in the header"
        raise _damaged(f"{path} is truncated: its gzip stream breaks off {place}") from None
    except (OSError, zlib.error) as error:
        raise _damaged(f"{path} cannot be read: {error}") from None
    if found != expected:
        fault = "truncated" if found < expected else "too long"
        raise _damaged(f"{path} is {fault}: expected {expected} bytes, found {found}")
    return dimensions


def read_idx(path: Path) -> Tensor:
    """Return the values of a checked file, uint8 in the shape that its header gives."""
    with _open(path) as stream:
        content = bytearray(stream.read())
    rank = content[3]
    dimensions = [int.from_bytes(content[at : at + 4], "big") for at in range(4, 4 + 4 * rank, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * rank).reshape(dimensions)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


def _header(path: Path, header: bytes, rank: int) -> tuple[int, ...]:
    length = 4 + 4 * rank
    if len(header) < length:
        raise _damaged(f"{path} is truncated: expected {length} bytes of header, found {len(header)}")
    magic = bytes((0, 0, 8, rank))  # two zeros, 0x08 = unsigned byte, number of dimensions
    if header[:4] != magic:
        raise _damaged(
            f"{path} is not an IDX file of unsigned bytes in {rank} dimensions: its magic number is "
            f"0x{header[:4].hex()}, not 0x{magic.hex()}"
        )
    dimensions = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, length, 4))
    if 0 in dimensions:
        raise _damaged(f"{path} is empty: its dimensions are {dimensions}")
    return dimensions
