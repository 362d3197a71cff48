"""The critic of local critic training: convolutions and a linear layer, without pooling (Lee & Lee 2019).

Legend: B batch, C channels, H x W image, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, first_tensor
from decoupled_pp.critics.requirements import judged_tensor
from decoupled_pp.settings.critics import ConvCritic


class Convolutions(nn.Sequential):
    """Convolutions without pooling: (B, C, H, W) -> n x (conv3x3, ReLU), flatten, linear -> (B, K)."""

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        features = first_tensor(hidden)
        for layer in self:
            features = layer(features)
        return features


def build_conv(settings: ConvCritic, context: CriticContext) -> Convolutions:
    """Build the convolutional critic of one stage.

    Source: Lee & Lee 2019 (1805.01128), section IV.
    """
    hidden = judged_tensor("conv", context, (4,))
    _, channels, height, width = hidden.shape
    parts: list[nn.Module] = []
    for _ in range(settings.convolutions):
        parts += [nn.Conv2d(channels, settings.channels, 3, padding=1), nn.ReLU()]
        channels = settings.channels
    linear = nn.Linear(channels * height * width, context.output.shape[1])
    return Convolutions(*parts, nn.Flatten(), linear).to(device=hidden.device, dtype=hidden.dtype)
