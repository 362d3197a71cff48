"""Chooses which samples are held out for validation, by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from decoupled_pp.data.seeds import Purpose, generator


def random_split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return sorted indices (training, held out) of `count` >= 2 samples; neither is empty."""
    amount = min(max(round(fraction * count), 1), count - 1)  # at least one sample in either part
    order = torch.randperm(count, generator=generator(seed, Purpose.SPLIT))
    return order[amount:].sort().values.tolist(), order[:amount].sort().values.tolist()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return sorted indices (training, held out), every class of two samples or more with its share in both."""
    order = torch.randperm(len(labels), generator=generator(seed, Purpose.SPLIT))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        amount = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[:amount]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
