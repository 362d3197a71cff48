"""predsim: predicts labels, and matches similarities of samples to those of their labels (Nokland & Eidnes 2019).

Legend: B batch, C channels, D width, H x W image, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, first_tensor
from decoupled_pp.critics.requirements import class_indices, ignored_by, judged_tensor, share
from decoupled_pp.settings.critics import PredsimCritic

_EPSILON = 1e-8


def similarities(features: Tensor) -> Tensor:
    """Return (B, ...) -> (B, B): cosine similarity of the samples' features, each sample's centred about its own mean.

    For images (more than 3 channels, more than one row) the features are each channel's standard deviation over space.

    Source: Nokland & Eidnes 2019 (1901.06656), section 2.2, and the authors' code.
    """
    if features.dim() == 4 and features.shape[1] > 3 and features.shape[2] > 1:
        features = features.flatten(2).std(dim=2)
    features = features.flatten(1)
    centred = features - features.mean(dim=1, keepdim=True)
    # The epsilon keeps a sample with constant features from dividing by 0.
    unit = centred / (_EPSILON + centred.square().sum(dim=1, keepdim=True).sqrt())
    return (unit @ unit.T).clamp(-1, 1)


class Predsim(Critic):
    """A linear prediction, and one more layer for the similarities.

    (B, C, H, W) or (B, D) -> average pool, flatten, linear -> (B, K).
    """

    def __init__(self, hidden: Tensor, outputs: int, settings: PredsimCritic) -> None:
        super().__init__()
        channels = hidden.shape[1]
        self.similarity = settings.similarity
        self.pool: nn.Module = nn.Identity()
        self.projection: nn.Module
        if hidden.dim() == 4:
            self.pool = pooling(tuple(hidden.shape), settings)
            self.projection = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        else:
            self.projection = nn.Linear(channels, channels, bias=False)
        self.prediction = nn.Linear(self._pooled(hidden).shape[1], outputs)
        nn.init.zeros_(self.prediction.weight)  # as the authors' code does

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.prediction(self._pooled(first_tensor(hidden)))
        return logits

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return (1 - b) loss(W pool(h), y) + b mean (S(projection(h)) - S(onehot y))^2, over all pairs of samples."""
        logits = self(view.hidden)
        classes = class_indices("predsim", view.target, logits)
        counted = classes != ignored_by(loss)
        labels = similarities(functional.one_hot(classes * counted, logits.shape[-1]).to(logits.dtype))
        ours = similarities(self.projection(first_tensor(view.hidden)))
        b = self.similarity
        pairs = counted[:, None] & counted
        distance = functional.mse_loss(ours * pairs, labels * pairs) / share(pairs, ours)
        return (1 - b) * loss(logits, view.target) + b * distance

    def _pooled(self, hidden: Tensor) -> Tensor:
        pooled: Tensor = self.pool(hidden)
        return pooled.flatten(1)


def pooling(shape: tuple[int, ...], settings: PredsimCritic) -> nn.AvgPool2d:
    """Return average pooling of (B, C, H, W) to at most `settings.features` features, if it can be so few."""
    if settings.pooling == "square":
        return nn.AvgPool2d(square_kernel(shape, settings.features))
    kernel = rectangular_kernel(shape, settings.features)
    # Half a kernel of zeros on both sides where it does not fit whole, as the authors' code does: sizes are rounded up.
    padding = [one // 2 if side % one else 0 for one, side in zip(kernel, shape[2:], strict=True)]
    return nn.AvgPool2d(kernel, padding=(padding[0], padding[1]))


def rectangular_kernel(shape: tuple[int, ...], most: int) -> tuple[int, int]:
    """Return kernel (and stride): doubled in turn, height first, until `most` features of (B, C, H, W) are left.

    Source: Nokland & Eidnes 2019, the authors' code, which has it for square images.
    """
    sides, kernel, turn = shape[2:], [1, 1], 0
    while shape[1] * math.prod(map(_rounded_up, sides, kernel)) > most and _is_larger(sides, kernel):
        if kernel[turn] < sides[turn]:
            kernel[turn] *= 2
        turn = 1 - turn
    return kernel[0], kernel[1]


def _rounded_up(side: int, kernel: int) -> int:
    return -(-side // kernel)


def _is_larger(sides: tuple[int, ...], kernel: list[int]) -> bool:
    return any(one < side for one, side in zip(kernel, sides, strict=True))


def square_kernel(shape: tuple[int, ...], most: int) -> int:
    """Return kernel (and stride), alike in height and width, sizes rounded down: the form of earlier versions."""
    _, channels, height, width = shape
    kernel = 1
    while channels * (height // kernel) * (width // kernel) > most and 2 * kernel <= min(height, width):
        kernel *= 2
    return kernel


def build_predsim(settings: PredsimCritic, context: CriticContext) -> Predsim:
    """Build the predsim critic of one stage."""
    hidden = judged_tensor("predsim", context)
    with torch.no_grad():  # it pools the sample once, to learn how many features are left
        critic = Predsim(hidden, context.output.shape[1], settings)
    return critic.to(device=hidden.device, dtype=hidden.dtype)
