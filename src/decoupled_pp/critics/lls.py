"""LLS: scores similarity to fixed sinusoids, one per class; only the stage is trained (Apolinario & Roy 2025).

Legend: B batch, C channels, D features, H x W image, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext
from decoupled_pp.core.packets import Payload, first_tensor
from decoupled_pp.critics.requirements import judged_tensor
from decoupled_pp.settings.critics import LlsCritic

LOWEST = 50.0  # frequency of the first class
HIGHEST = 512.0  # of the last one


def sinusoids(classes: int, features: int) -> Tensor:
    """Return (K, D): sin(f_c t), t = 0 .. D-1, f = linspace(50, 512, K).

    Source: Apolinario & Roy 2025 (WACV), section 3, and the authors' code.
    """
    # In double precision: the sine of a phase in the thousands would lose digits in single precision.
    frequencies = torch.linspace(LOWEST, HIGHEST, classes, dtype=torch.float64)
    return torch.sin(frequencies[:, None] * torch.arange(features, dtype=torch.float64)).float()


class Lls(Critic):
    """Compares features with every class's sinusoid.

    (B, C, H, W) or (B, D) -> pool, normalise, scalar products, divide by the temperature -> (B, K).

    Source: Apolinario & Roy 2025, the authors' code: `pooling_size` 4 for images and vectors, temperature 0.5.
    """

    basis: Tensor

    def __init__(self, pooled: int | None, basis: Tensor, temperature: float) -> None:
        super().__init__()
        self.pooled = pooled
        self.temperature = temperature
        self.register_buffer("basis", basis)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        features = first_tensor(hidden)
        if self.pooled is not None:
            features = _pool(features, self.pooled)
        return functional.normalize(features, dim=1) @ self.basis.to(features.dtype).T / self.temperature


def _pool(features: Tensor, size: int) -> Tensor:
    """Average an image to `size` x `size` per channel, a vector to `size` features: -> (B, features)."""
    if features.dim() == 2:
        return functional.adaptive_avg_pool1d(features, size)
    return functional.adaptive_avg_pool2d(features, size).flatten(1)


def build_lls(settings: LlsCritic, context: CriticContext) -> Lls:
    """Build the LLS critic of one stage."""
    hidden = judged_tensor("lls", context)
    pooled = None if hidden.dim() == 2 and settings.vectors == "whole" else settings.pooled
    features = hidden if pooled is None else _pool(hidden, pooled)
    basis = sinusoids(context.output.shape[1], features.shape[1])
    return Lls(pooled, basis, settings.temperature).to(hidden.device)
