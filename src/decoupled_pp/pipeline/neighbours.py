"""Measures how well a stage's output tells classes apart without any critic, by its nearest training samples.

Legend: B batch, D features, N samples kept, k neighbours.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import View
from decoupled_pp.core.packets import Payload, as_tuple, first_tensor
from decoupled_pp.pipeline.probes import Probe


class Neighbours(Probe):
    """Keeps the last training samples of a stage, and scores held-out ones by a vote of the nearest."""

    def __init__(self, k: int, samples: int) -> None:
        self._k = k
        self._samples = samples
        self._kept: deque[tuple[Tensor, Tensor]] = deque()
        self._count = 0
        self._correct: Tensor | int = 0  # a tensor on the device, read in `results` alone: nothing waits for it before
        self._scored = 0

    def trained(self, view: View) -> None:
        """Keep a training micro-batch; the oldest ones leave for it."""
        features = _features(view.hidden)
        classes = _classes(view.target)
        self._kept.append((features, classes))
        self._count += len(classes)
        # Whole micro-batches leave, so that no copy is made for a part of one.
        while self._count - len(self._kept[0][1]) >= self._samples:
            self._count -= len(self._kept.popleft()[1])

    def evaluated(self, hidden: Payload, target: Payload) -> None:
        """Classify a held-out micro-batch by a vote of the k most similar kept samples (cosine)."""
        if not self._kept:
            return
        features = torch.cat([features for features, _ in self._kept])[-self._samples :]
        classes = torch.cat([classes for _, classes in self._kept])[-self._samples :]
        nearest = (_features(hidden) @ features.T).topk(min(self._k, len(classes)), dim=1).indices
        wanted = _classes(target)
        self._correct = self._correct + (classes[nearest].mode(dim=1).values == wanted).sum()
        self._scored += len(wanted)

    def results(self) -> dict[str, float | None]:
        """Return the share classified right since the last call as `knn_accuracy`; None if nothing was scored."""
        found = float(self._correct) / self._scored if self._scored else None
        self._correct = 0
        self._scored = 0
        return {"knn_accuracy": found}


def _features(hidden: Payload) -> Tensor:
    """Return the mean over space or sequence, (B, D), each row of length 1."""
    tensor = first_tensor(hidden).detach().float()
    if tensor.dim() == 4:  # (B, D, H, W)
        tensor = tensor.flatten(2).mean(dim=2)
    elif tensor.dim() == 3:  # (B, T, D)
        tensor = tensor.mean(dim=1)
    return functional.normalize(tensor.flatten(1), dim=1)


def _classes(target: Payload) -> Tensor:
    classes = as_tuple(target)[0]
    if classes.dim() != 1 or classes.is_floating_point():
        raise UsageError(
            f"`validation.knn` needs one class index per sample, not targets {tuple(classes.shape)} {classes.dtype}; "
            "leave it out",
            code="knn-needs-classes",
            key="validation.knn",
        )
    return classes
