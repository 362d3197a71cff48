"""MLP-SR: the spatially reduced MLP critic of decoupled greedy learning (Belilovsky et al. 2020).

Legend: B batch, C channels, H x W image, D width, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, first_tensor
from decoupled_pp.critics.requirements import judged_tensor, refuse_single_value
from decoupled_pp.settings.critics import MlpSrCritic

# Convolutions and linear layers followed by batch normalisation have no bias: the normalisation would cancel it.


class _NormalisedLayers(nn.Sequential):
    """Layers with batch normalisation, which needs two values of a channel to train on."""

    def forward(self, features: Tensor) -> Tensor:
        """Run the layers."""
        if self.training and len(self) > 1:
            refuse_single_value("mlp_sr", features)
        for layer in self:
            features = layer(features)
        return features


class MlpSr(nn.Module):
    """The whole critic for images; for vectors (B, D) the linear part alone.

    (B, C, H, W) -> pool to a quarter -> n x (conv1x1, BN, ReLU) -> pool to 2x2 -> m x (linear, BN, ReLU), linear
    -> (B, K).
    """

    def __init__(self, width: int, reduced: tuple[int, int] | None, outputs: int, settings: MlpSrCritic) -> None:
        super().__init__()
        self.reduced = reduced
        parts: list[nn.Module] = []
        if reduced is not None:
            for _ in range(settings.convolutions):
                parts += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.convolutions = _NormalisedLayers(*parts)
            width = 4 * width
        parts = []
        for _ in range(settings.linears):
            parts += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.linears = _NormalisedLayers(*parts, nn.Linear(width, outputs))

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        features = first_tensor(hidden)
        if self.reduced is not None:
            features = self.convolutions(F.adaptive_avg_pool2d(features, self.reduced))
            features = F.adaptive_avg_pool2d(features, 2).flatten(1)
        logits: Tensor = self.linears(features)
        return logits


def build_mlp_sr(settings: MlpSrCritic, context: CriticContext) -> nn.Module:
    """Build the MLP-SR critic of one stage; the spatial reduction is to ceil(H/4) x ceil(W/4).

    Token sequences are refused: the linear layers would mix positions, and so show each one its future.

    Source: Belilovsky et al. 2020 (1901.08164), section 5 and appendix, "MLP-SR-aux".
    """
    hidden = judged_tensor("mlp_sr", context)
    reduced = None
    if hidden.dim() == 4:
        reduced = (-(-hidden.shape[2] // 4), -(-hidden.shape[3] // 4))
    critic = MlpSr(hidden.shape[1], reduced, context.output.shape[1], settings)
    return critic.to(device=hidden.device, dtype=hidden.dtype)
