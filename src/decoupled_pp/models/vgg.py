"""Builds the VGG-like network of local critic training (Lee & Lee 2019), as a list of layers.

On CIFAR-10 it has 7 867 594 parameters. The paper says 7.86M, which is exactly the convolutions and the flattened-4x4
linear layer (7 861 962) without the 5 632 scales and shifts of batch normalisation; a pooled head would give 7.79M.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.models.fit import expect_form
from decoupled_pp.settings.sections import VggModel

GROUPS = (2, 3, 3, 3)  # convolutions; every group doubles the channels, and all but the first begin with stride 2


class Layer(nn.Module):
    """3x3 convolution, BN, ReLU: (B, C, H, W) -> (B, C', ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh (He et al. 2015)."""
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")
        self.norm.reset_parameters()

    def auglocal_copy(self, in_channels: int, stride: int, out_channels: int) -> Layer:
        """Build a layer for another input: an AugLocal critic puts it on a narrower stage output."""
        return Layer(in_channels, out_channels, stride)

    def forward(self, hidden: Tensor) -> Tensor:
        """Convolve."""
        return F.relu(self.norm(self.convolution(hidden)))


def build_vgg(settings: VggModel, info: DataInfo) -> nn.Sequential:
    """Build layers `layer0`..`layer10`, `head`: (B, C, H, W) -> (B, outputs) logits.

    They are [w,w | 2w s2,2w,2w | 4w s2,4w,4w | 8w s2,8w,8w, fc], of 3x3 convolutions with BN and ReLU.

    Source: Lee & Lee 2019 (1805.01128), section IV.
    """
    expect_form(info, "vgg", "image")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, height, width = info.shape
    for group, convolutions in enumerate(GROUPS):
        for position in range(convolutions):
            stride = 2 if group > 0 and position == 0 else 1
            layers[f"layer{len(layers)}"] = Layer(channels, settings.width * 2**group, stride)
            channels = settings.width * 2**group
            height = -(-height // stride)
            width = -(-width // stride)
    layers["head"] = nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(channels * height * width, info.outputs))
    )
    return nn.Sequential(layers)
