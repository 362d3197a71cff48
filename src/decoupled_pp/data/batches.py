"""Makes micro-batches a pure function of (seed, batch number): endless training stream and validation pass.

    batch number   0     1     2  |  3     4     5  |  6 ...        3 batches per epoch, the rest of an epoch is dropped
    epoch          0              |  1              |  2
    samples        order(seed, 0) |  order(seed, 1) |  order(seed, 2)

Every epoch has the same number of batches, so batch n is found by division: resuming reads no batch before n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor

from decoupled_pp.core.datasets import BatchSource, Data, DataInfo
from decoupled_pp.core.packets import Batch
from decoupled_pp.data.seeds import Purpose, generator
from decoupled_pp.settings.sections import BatchSettings


class Samples(ABC):
    """A fixed number (at least 1) of samples that can be taken by index."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples, the same in every epoch."""

    @abstractmethod
    def take(self, indices: Tensor, epoch: int | None) -> Batch:
        """Return new tensors with the samples at `indices` (B,); `epoch` is None in validation."""


Loader: TypeAlias = Callable[[], Samples]  # called when a source is first iterated

Augmentation: TypeAlias = Callable[[Batch, torch.Generator], Batch]
"""Changes a batch with random numbers from the given generator only."""


def changed(batch: Batch, change: Augmentation | None, number: int, seed: int | None) -> Batch:
    """Apply `change` to batch `number`; `seed` is None in validation, whose numbers are the same for every seed."""
    if change is None:
        return batch
    if seed is None:
        return change(batch, generator(0, Purpose.HELD_OUT, number))
    return change(batch, generator(seed, Purpose.AUGMENTATION, number))


class TrainingBatches(BatchSource):
    """Endless stream with a fresh order for every epoch, without the last partial batch of an epoch.

    A data set smaller than one batch is one batch per epoch, of the whole set.
    """

    def __init__(self, load: Loader, batch_size: int, seed: int, augmentation: Augmentation | None = None) -> None:
        self._load = load
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on, without end."""
        samples = self._load()
        size = min(self._batch_size, len(samples))
        per_epoch = len(samples) // size
        first_epoch, first_position = divmod(start, per_epoch)  # no batch before `start` is read
        for epoch in count(first_epoch):
            order = torch.randperm(len(samples), generator=generator(self._seed, Purpose.ORDER, epoch))
            for position in range(first_position, per_epoch):
                batch = samples.take(order[position * size : (position + 1) * size], epoch)
                yield changed(batch, self._augmentation, epoch * per_epoch + position, self._seed)
            first_position = 0


class ValidationBatches(BatchSource):
    """One finite pass in fixed order, the same every time; the last batch may be smaller."""

    def __init__(self, load: Loader, batch_size: int, change: Augmentation | None = None) -> None:
        self._load = load
        self._batch_size = batch_size
        self._change = change

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` to the end of the pass."""
        samples = self._load()
        for first in range(start * self._batch_size, len(samples), self._batch_size):
            batch = samples.take(torch.arange(first, min(first + self._batch_size, len(samples))), None)
            yield changed(batch, self._change, first // self._batch_size, None)


def sampled_data(  # noqa: PLR0917 - the facts and the settings, two parts, and what changes each
    info: DataInfo,
    settings: BatchSettings,
    seed: int,
    train: Loader,
    validation: Loader,
    augmentation: Augmentation | None = None,
    change: Augmentation | None = None,
) -> Data:
    """Return a data set of samples: `augmentation` is for training, `change` for validation."""
    size = settings.validation_batch_size or settings.batch_size
    training = TrainingBatches(train, settings.batch_size, seed, augmentation)
    return Data(info, training, ValidationBatches(validation, size, change))
