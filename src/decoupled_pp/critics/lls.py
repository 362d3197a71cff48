"""LLS: similarity to fixed sinusoids, one per class; nothing is trained but the stage (Apolinario & Roy 2025).

Legend: B batch, C channels, D features, H x W image, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext
from decoupled_pp.core.packets import Payload, first_tensor
from decoupled_pp.critics.labels import judged_tensor
from decoupled_pp.settings.critics import LlsCritic

LOWEST, HIGHEST = 50.0, 512.0
"""Frequencies of the first and of the last class."""


def sinusoids(classes: int, features: int) -> Tensor:
    """(K, D): sin(f_c t), t = 0 .. D-1, f = linspace(50, 512, K).

    Source: Apolinario & Roy 2025 (WACV), section 3, and the authors' code.
    """
    frequencies = torch.linspace(LOWEST, HIGHEST, classes, dtype=torch.float64)
    return torch.sin(frequencies[:, None] * torch.arange(features, dtype=torch.float64)).float()


class Lls(Critic):
    """(B, C, H, W) or (B, D) -> pool, normalise, compare with every class's sinusoid, divide by T -> (B, K)."""

    basis: Tensor

    def __init__(self, pooled: int | None, basis: Tensor, temperature: float) -> None:
        super().__init__()
        self.pooled, self.temperature = pooled, temperature
        self.register_buffer("basis", basis)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        features = first_tensor(hidden)
        if self.pooled is not None:
            features = functional.adaptive_avg_pool2d(features, self.pooled).flatten(1)
        return functional.normalize(features, dim=1) @ self.basis.to(features.dtype).T / self.temperature


def build_lls(settings: LlsCritic, context: CriticContext) -> Lls:
    """The LLS critic of one stage.

    Raises:
        UsageError: The stage's output is neither an image nor a vector, or the network's is not (B, K).
    """
    hidden = judged_tensor("lls", context)
    image = hidden.dim() == 4
    features = hidden.shape[1] * settings.pooled**2 if image else hidden.shape[1]
    basis = sinusoids(context.output.shape[1], features)
    return Lls(settings.pooled if image else None, basis, settings.temperature).to(hidden.device)
