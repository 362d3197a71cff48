"""Keeps labelled images as bytes and normalises them batch by batch; the standard augmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.datasets import Data, DataInfo
from decoupled_pp.core.packets import Batch, first_tensor
from decoupled_pp.data.batches import Samples, sampled_data
from decoupled_pp.settings.sections import BatchSettings

PADDING = 4


class Pixels(NamedTuple):
    """Raw images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor


class PixelSamples(Samples):
    """Images kept as bytes, a quarter of the memory of floats; they become float32 and are normalised when taken."""

    def __init__(self, pixels: Pixels, mean: Tensor, deviation: Tensor) -> None:
        self._pixels = pixels
        self._mean = mean[:, None, None]
        self._deviation = deviation[:, None, None]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._pixels.images)

    def take(self, indices: Tensor, epoch: int | None) -> Batch:
        """Return images (B, C, H, W) float32 and labels (B,) int64."""
        images = self._pixels.images[indices].float()
        return (images - self._mean) / self._deviation, self._pixels.labels[indices]


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of every channel of byte images (N, C, H, W).

    They are computed from a count of the 256 values, in double precision: no float copy of the images is made.
    """
    values = torch.arange(256, dtype=torch.float64)
    means = []
    deviations = []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        means.append(mean)
        deviations.append((share * (values - mean) ** 2).sum().sqrt())
    deviation = torch.stack(deviations)
    deviation[deviation == 0] = 1.0  # a constant channel stays 0 instead of becoming 0/0
    return torch.stack(means).float(), deviation.float()


def crop_and_flip(batch: Batch, random: torch.Generator) -> Batch:
    """Pad by 4 zeros, crop at random, mirror half of the images on average (He et al. 2016, section 4.2).

    Images (B, C, H, W) come normalised, so the padding is the mean colour.
    """
    images = first_tensor(batch[0])
    target = batch[1]
    size, channels, height, width = images.shape
    top = torch.randint(2 * PADDING + 1, (size, 1), generator=random)
    left = torch.randint(2 * PADDING + 1, (size, 1), generator=random)
    mirrored = torch.rand((size, 1), generator=random) < 0.5
    row = top + torch.arange(height)
    column = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    padded = functional.pad(images, (PADDING,) * 4)
    # One gather for the whole batch: four index tensors that broadcast to (B, C, H, W).
    sample = torch.arange(size)[:, None, None, None]
    channel = torch.arange(channels)[:, None, None]
    return padded[sample, channel, row[:, None, :, None], column[:, None, None, :]], target


def open_pixels(
    info: DataInfo,
    load: Callable[[], tuple[Pixels, Pixels]],
    settings: BatchSettings,
    seed: int,
    augment: bool,
) -> Data:
    """Open byte images; mean and deviation come from the training images, for both parts."""

    @cache  # both sources share one copy in memory
    def normalised() -> tuple[Samples, Samples]:
        train, validation = load()
        mean, deviation = channel_statistics(train.images)
        return PixelSamples(train, mean, deviation), PixelSamples(validation, mean, deviation)

    augmentation = crop_and_flip if augment else None
    return sampled_data(info, settings, seed, lambda: normalised()[0], lambda: normalised()[1], augmentation)


def image_info(shape: tuple[int, int, int], classes: int) -> DataInfo:
    """Return the facts about an image data set; `shape` is (C, H, W)."""
    return DataInfo(form="image", shape=shape, outputs=classes)
