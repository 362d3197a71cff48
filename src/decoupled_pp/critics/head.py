"""The cheapest critic: pool + linear, norm + vocabulary projection for tokens, a convolution for dense outputs.

Every family ends in it.

Legend: B batch, T tokens, D width, C channels, H x W image, K classes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.criterion import classes_in
from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, as_tuple, first_tensor, takes_gradient
from decoupled_pp.critics.fresh import trainable_copy
from decoupled_pp.settings.critics import HeadCritic


def features_of(hidden: Payload) -> Tensor:
    """Return the tensor that a head judges; of a complex one real and imaginary parts, side by side as features."""
    first = first_tensor(hidden)
    if not first.is_complex():
        return first
    return torch.cat([first.real, first.imag], dim=1 if first.dim() == 4 else -1)


class LinearHead(nn.Module):
    """Linear layer, for images behind global average pooling: (B, C, H, W) or (B, D) -> (B, K)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        features = features_of(hidden)
        logits: Tensor = self.linear(features.mean(dim=(2, 3)) if features.dim() == 4 else features)
        return logits


class TokenHead(nn.Module):
    """Norm and vocabulary projection of every position by itself: (B, T, D) -> (B, T, V)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, vocabulary, bias=False)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.projection(self.norm(features_of(hidden)))
        return logits


class DenseHead(nn.Module):
    """One 1x1 convolution, then linear interpolation to the size of the output: (B, C, H, W) -> (B, K, H', W').

    As the head of FCN (Long et al. 2015). The size follows the input by the ratio that it has in the sample.
    """

    def __init__(self, channels: int, outputs: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, outputs, 1)
        self.scale = scale

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.convolution(first_tensor(hidden))
        size = [round(extent * factor) for extent, factor in zip(logits.shape[2:], self.scale, strict=True)]
        if list(logits.shape[2:]) == size:
            return logits
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class PatchHead(nn.Module):
    """Norm and a patch of pixels from every token, as the last layer of a DiT: (B, T, D) -> (B, K, H, W).

    The tokens are the patches of the image in rows.
    """

    def __init__(self, width: int, outputs: int, patch: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, outputs * patch * patch)
        self.patch = patch
        self.ratio = ratio  # height of the image / its width

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        pixels: Tensor = self.linear(self.norm(first_tensor(hidden))).transpose(1, 2)
        rows = round((pixels.shape[2] * self.ratio) ** 0.5)
        return functional.pixel_shuffle(pixels.unflatten(2, (rows, -1)), self.patch)


class SequenceHead(nn.Module):
    """Norm, mean over the sequence, linear layer: (B, T, D) -> (B, K).

    A boolean mask (B, T) behind the hidden state, True where a token counts, leaves padding out of the mean.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, outputs)

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        rows: Tensor = self.norm(features_of(hidden))
        mask = padding_mask(hidden)
        if mask is None:
            mean = rows.mean(dim=1)
        else:
            weights = mask[..., None].to(rows.dtype)
            # A row of padding alone is 0 / 1, not 0 / 0.
            mean = (rows * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        logits: Tensor = self.linear(mean)
        return logits


class MovedHead(nn.Module):
    """A head for features and classes in another dimension than usual: both are moved there and back."""

    def __init__(self, head: nn.Module, usual: int, given: int) -> None:
        super().__init__()
        self.head = head
        self.usual = usual
        self.given = given

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.head(_moved(first_tensor(hidden), self.given, self.usual))
        return logits.movedim(self.usual, self.given)


def _moved(features: Tensor, given: int, usual: int) -> Tensor:
    """Return a stage's output with its features where heads look for them; vectors have but one place for them."""
    return features.movedim(given, usual) if features.dim() > max(given, usual) else features


def padding_mask(payload: Payload) -> Tensor | None:
    """Return the only boolean tensor (B, T) behind a hidden state (B, T, D); None if there is none, or several."""
    first, *others = as_tuple(payload)
    found = [tensor for tensor in others if tensor.dtype == torch.bool and tensor.shape == first.shape[:2]]
    return found[0] if len(found) == 1 else None


def matching_head(hidden: Payload, output: Tensor, stage: int, class_dim: int | None = None) -> nn.Module:
    """Build a fresh head from samples like `hidden`, in its dtype and on its device, to logits shaped like `output`.

    The features of a sample are where the output has its classes (`classes_in`): sizes may be equal by chance.
    """
    given, usual = classes_in(output, class_dim), classes_in(output, None)
    if given != usual:
        moved = _moved(first_tensor(hidden), given, usual)
        return MovedHead(_usual_head(moved, output.movedim(given, usual), stage, given), usual, given)
    return _usual_head(hidden, output, stage, given)


def _usual_head(hidden: Payload, output: Tensor, stage: int, classes: int) -> nn.Module:
    """Build a head where features and classes are at their usual places; `classes` is where they were given."""
    first = first_tensor(hidden)
    if not takes_gradient(first):
        kind = first.dtype if first.layout is torch.strided else first.layout
        raise UsageError(
            f"stage {stage}: its output is {kind}, which no critic can judge; `cut` elsewhere, or "
            "return a floating tensor first",
            code="critic-unfit",
            key="cut",
        )
    first = features_of(first)
    head: nn.Module
    width = first.shape[-1] if first.dim() else 0
    match first.dim(), output.dim():
        case 4 | 2, 2:
            head = LinearHead(first.shape[1], output.shape[1])
        case 3, 3 if first.shape[1] == output.shape[1]:
            head = TokenHead(width, output.shape[2])
        case 4, 4:
            (height, width), (tall, wide) = first.shape[2:], output.shape[2:]
            head = DenseHead(first.shape[1], output.shape[1], (tall / height, wide / width))
        case 3, 4 if (patch := _patch(first.shape[1], output)) is not None:
            head = PatchHead(width, output.shape[1], patch, output.shape[2] / output.shape[3])
        case 3, 2:
            head = SequenceHead(width, output.shape[1])
        case _:
            raise _no_head(first, output, stage, classes)
    return head.to(device=first.device, dtype=first.dtype)


def _no_head(first: Tensor, output: Tensor, stage: int, classes: int) -> UsageError:
    usual = classes_in(output, None)
    shapes = [tuple(_moved(first, usual, classes).shape), tuple(output.movedim(usual, classes).shape)]
    place = remedy = ""
    if output.dim() > 2:
        place = f", features and classes in dimension {classes}"
        remedy = "say where the classes are (`loss` {class_dim: ...}), "
    return UsageError(
        f"stage {stage}: no built-in head leads from a stage output of shape {shapes[0]} to network outputs of shape "
        f"{shapes[1]}{place}; {remedy}`cut` elsewhere, or give your own critic (`critic.kind` factory)",
        code="critic-unfit",
        key="critic.kind",
    )


def _patch(tokens: int, output: Tensor) -> int | None:
    """Return the side of the square patches of an output that as many tokens stand for; None if there are none."""
    height, width = output.shape[2:]
    sides = (side for side in range(1, min(height, width) + 1) if height % side == 0 and width % side == 0)
    return next((side for side in sides if height * width == tokens * side * side), None)


def own_head(context: CriticContext, hidden: Payload) -> nn.Module:
    """Return a copy of the network's last layer with its weights."""
    wanted = tuple(first_tensor(context.hiddens[-1]).shape)
    given = tuple(first_tensor(hidden).shape)
    if wanted != given:
        raise UsageError(
            f"stage {context.stage}: `critic.weights` network copies the network's last layer, which takes shape "
            f"{wanted} and is given {given} here; choose `critic.weights` fresh",
            code="critic-unfit",
            key="critic.weights",
        )
    return trainable_copy(context.layers[-1])


def build_head(settings: HeadCritic, context: CriticContext) -> nn.Module:
    """Build the head critic of one stage."""
    if settings.weights == "network":
        return own_head(context, context.hidden)
    return matching_head(context.hidden, context.output, context.stage, context.class_dim)
