"""Builds the CIFAR ResNet (He et al. 2016, section 4.2), as a list of layers.

Shortcuts are the paper's option A: where a block halves the image and widens, the shortcut takes every second pixel and
pads the new channels with zeros. It has no parameters, and it is what the paper used on CIFAR-10.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from decoupled_pp.core.datasets import DataInfo
from decoupled_pp.core.errors import UsageError
from decoupled_pp.models.fit import expect_form
from decoupled_pp.settings.sections import ResnetModel


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class Stem(nn.Module):
    """First 3x3 convolution, BN and ReLU: (B, C, H, W) -> (B, width, H, W)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.convolution = _convolution(in_channels, width)
        self.norm = nn.BatchNorm2d(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh (He et al. 2015)."""
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")
        self.norm.reset_parameters()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Convolve."""
        return F.relu(self.norm(self.convolution(image_BCHW)))


class Block(nn.Module):
    """Basic residual block of two 3x3 convolutions: (B, C, H, W) -> (B, C', ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if in_channels > out_channels:
            raise UsageError(
                f"a ResNet block with option A shortcuts cannot narrow {in_channels} channels to {out_channels}; "
                "`cut` the network elsewhere, or choose `critic.kind` head",
                code="layer-not-copyable",
                key="critic.kind",
            )
        self.out_channels = out_channels
        self.stride = stride
        self.padding = out_channels - in_channels
        self.convolution1 = _convolution(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.convolution2 = _convolution(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise afresh (He et al. 2015)."""
        for convolution in (self.convolution1, self.convolution2):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()

    def auglocal_copy(self, in_channels: int, stride: int, out_channels: int) -> Block:
        """Build a block for another input: an AugLocal critic puts it on a narrower stage output."""
        return Block(in_channels, out_channels, stride)

    def _shortcut(self, hidden: Tensor) -> Tensor:
        if self.stride > 1:
            hidden = hidden[:, :, :: self.stride, :: self.stride]  # every second pixel, as in the paper: no averaging
        if not self.padding:
            return hidden
        before = self.padding // 2
        return F.pad(hidden, (0, 0, 0, 0, before, self.padding - before))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute relu(shortcut + residual)."""
        residual = F.relu(self.norm1(self.convolution1(hidden)))
        return F.relu(self._shortcut(hidden) + self.norm2(self.convolution2(residual)))


def build_resnet(settings: ResnetModel, info: DataInfo) -> nn.Sequential:
    """Build layers `stem`, `block0`.., `head`: (B, C, H, W) -> (B, outputs) logits.

    A CIFAR ResNet has 6n+2 weighted layers: n blocks in each of three groups, widths w, 2w, 4w.

    Source: He et al. 2016 (1512.03385), section 4.2 and table 6 (ResNet-20 0.27M, ResNet-56 0.85M parameters).
    """
    expect_form(info, "resnet", "image")
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=Stem(info.shape[0], settings.width))
    channels = settings.width
    blocks = (settings.depth - 2) // 6
    for index in range(3 * blocks):
        group = index // blocks
        width = settings.width * 2**group
        begins_wider_group = group > 0 and index % blocks == 0
        layers[f"block{index}"] = Block(channels, width, stride=2 if begins_wider_group else 1)
        channels = width
    layers["head"] = nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, info.outputs))
    )
    return nn.Sequential(layers)
