"""Reads images and labels from two columns of a Hugging Face data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.data.huggingface_labelled import Reader, open_labelled
from decoupled_pp.data.images import image_info
from decoupled_pp.data.streams import Rows
from decoupled_pp.settings.sections import HuggingFaceData


def open_image_rows(settings: HuggingFaceData, seed: int, train: Rows, validation: Rows | None) -> Data:
    """Open images: float32 (C, H, W), grey or RGB as the first image is.

    Values are scaled from 0..255 to -1..1, because the mean of a stream is not known. Images are decoded when their
    batch is taken.
    """
    column = settings.image_column or ""
    return open_labelled(settings, seed, train, validation, column, lambda first: _ImageReader(first, column))


class _ImageReader(Reader):
    """Decodes images, and refuses those that do not look like the first."""

    def __init__(self, first: Any, column: str) -> None:
        if not hasattr(first, "convert"):
            raise UsageError(
                f"`data.image_column` {column!r} holds {type(first).__name__}, not images; cast it with datasets.Image",
                code="wrong-column-type",
                key="data.image_column",
            )
        is_grey = first.mode in ("1", "L")
        self._mode = "L" if is_grey else "RGB"
        self._shape = (1 if is_grey else 3, first.height, first.width)

    def info(self, classes: int) -> DataInfo:
        return image_info(self._shape, classes)

    def read(self, value: Any) -> Tensor:
        """Decode a PIL image to (C, H, W)."""
        _, height, width = self._shape
        if (value.height, value.width) != (height, width):
            raise UsageError(
                f"`data.image_column`: an image is {value.width}x{value.height}, the first is {width}x{height}; "
                "resize all images to one size",
                code="images-differ-in-size",
                key="data.image_column",
            )
        values = torch.from_numpy(np.array(value.convert(self._mode), dtype=np.float32))
        return (values.reshape(height, width, -1).permute(2, 0, 1) / 127.5 - 1.0).contiguous()
