"""Opens scikit-learn's handwritten digits as images."""

from __future__ import annotations

import torch

from decoupled_pp.core.datasets import Data
from decoupled_pp.data.images import Pixels, image_info, open_pixels
from decoupled_pp.data.splits import stratified_split
from decoupled_pp.settings.sections import DigitsData


def open_digits(settings: DigitsData, seed: int) -> Data:
    """Open 1797 images (1, 8, 8) of 10 classes; values 0..16 are normalised with the training part's statistics.

    The held-out part is stratified: every class has the same share in it.
    """

    def load() -> tuple[Pixels, Pixels]:
        from sklearn.datasets import load_digits  # slow to import, and only rank 0 needs it

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
        labels = torch.from_numpy(bunch.target).long()
        train, held = stratified_split(labels, settings.validation_fraction, seed)
        return Pixels(images[train], labels[train]), Pixels(images[held], labels[held])

    return open_pixels(image_info((1, 8, 8), 10), load, settings, seed, augment=False)
