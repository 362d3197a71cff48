"""AugLocal: the critic is a fresh copy of layers sampled uniformly from those above the stage (Ma et al. 2024).

Notation of the paper, used below: n layers (the network's without its head), l the index of the stage's last layer,
K stages, d the depth of a critic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError, first_line
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, as_tuple, check_payload, first_tensor, map_payload
from decoupled_pp.critics.fresh import fresh_copy, make_fresh, trainable_copy
from decoupled_pp.critics.head import LinearHead, features_of, matching_head, own_head
from decoupled_pp.critics.requirements import critic_unfit, refuse_single_value, relative_position
from decoupled_pp.settings.critics import AuglocalCritic


def build_auglocal(settings: AuglocalCritic, context: CriticContext) -> nn.Module:
    """Build the AugLocal critic of one stage: sampled layers, freshly initialised, then the matching head.

    A sampled layer whose input in the network is shaped like its input here is copied as it is. Any other is rebuilt
    by its method `auglocal_copy(in_channels, stride, out_channels)`, with stride 2 where it widens its input.

    `weights: network` departs from the paper: copies and head begin with the network's own weights, for a network
    that is trained already.

    Source: Ma et al. 2024 (ICLR), section 3.
    """
    above = len(context.layers) - context.boundary
    if len(context.hiddens) != above:
        raise UsageError(
            f"stage {context.stage}: critic auglocal needs CriticContext.hiddens, the input of each of the {above} "
            f"layers above, but got {len(context.hiddens)}; trace the network",
            code="critic-context-incomplete",
        )
    depth = pyramidal_depth(settings.depth, settings.pyramid, context.stage, context.stages)
    where = f"stage {context.stage}: the auglocal critic's"
    narrowing = _narrowing(settings, context)
    # Every part is run on the sample as it is built, because the next part must take the shape that comes out.
    current = _run(narrowing, context.hidden, f"{where} narrowing")
    copies: list[nn.Module] = []
    for index in sampled_indices(context.boundary - 1, len(context.layers) - 1, depth):
        copies.append(_copy_for(settings, context, index, current))
        current = _run(copies[-1], current, f"{where} copy of layer {index} ({type(context.layers[index]).__name__})")
    return AuglocalChain(narrowing, copies, _head_for(settings, context, current, depth))


def pyramidal_depth(depth: int, pyramid: float, stage: int, stages: int) -> int:
    """Return the depth of the critic of one stage: deeper near the input.

    max(1, round(d(1 - c s) + c s)) with s = stage / (K - 2), the position among the K - 1 critics (0 if there is one);
    c is `pyramid`, the share taken off linearly towards the last critic.

    Source: Ma et al. 2024, section 3.3 (pyramidal depth), minimal depth 1.
    """
    taken_off = pyramid * relative_position(stage, stages)
    return max(1, round(depth * (1 - taken_off) + taken_off))


def sampled_indices(last: int, layers: int, depth: int) -> tuple[int, ...]:
    """Return the indices of the layers that a critic copies, strictly increasing; empty if none remain above the stage.

    round(l + (n-l-1)/d i), i = 1..d; all that remain if d >= n-1-l. l is `last`, n `layers`, d `depth`.

    Source: Ma et al. 2024, section 3.2 (uniform selection).
    """
    remaining = layers - 1 - last
    if depth >= remaining:
        return tuple(range(last + 1, layers))
    return tuple(round(last + remaining / depth * i) for i in range(1, depth + 1))


class AuglocalChain(nn.Module):
    """Narrows the stage's output, then runs copied layers and a head: a stage's output -> logits."""

    def __init__(self, narrowing: nn.Module, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.narrowing = narrowing
        self.layers = nn.ModuleList(layers)
        self.head = head

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        hidden = self.narrowing(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class NormedHead(nn.Module):
    """Pool, batch normalisation, linear layer, for a shallow critic of images: (B, C, H, W) -> (B, K).

    Source: Ma et al. 2024, the authors' code, `networks/auxiliary_nets.py`: `BatchNorm1d` at `aux_net_depth` <= 1.
    """

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        weight = head.linear.weight
        self.norm = nn.BatchNorm1d(weight.shape[1], device=weight.device, dtype=weight.dtype)
        self.linear = head.linear

    def forward(self, hidden: Payload) -> Tensor:
        """Judge what the copies made of a stage's output."""
        features = features_of(hidden).mean(dim=(2, 3))
        if self.training:
            refuse_single_value("auglocal", features)
        logits: Tensor = self.linear(self.norm(features))
        return logits


class PoolTo(nn.Module):
    """Average-pools images to at most `resolution` = r: (B, C, H, W) -> (B, C, min(H, r), min(W, r))."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, image: Tensor) -> Tensor:
        """Pool."""
        height, width = (min(side, self.resolution) for side in image.shape[-2:])
        return functional.adaptive_avg_pool2d(image, (height, width))


def _head_for(settings: AuglocalCritic, context: CriticContext, current: Payload, depth: int) -> nn.Module:
    """Build the head behind the copies: the network's own, or a fresh one."""
    if settings.weights == "network":
        return own_head(context, current)
    head = matching_head(current, context.output, context.stage, context.class_dim)
    if isinstance(head, LinearHead) and first_tensor(current).dim() == 4 and depth == 1 and settings.norm == "shallow":
        return NormedHead(head)
    return head


def _narrowing(settings: AuglocalCritic, context: CriticContext) -> nn.Module:
    """Build what comes before the copies: pooling to `resolution`, and a projection to `width` of the channels."""
    hidden = context.hidden
    first = first_tensor(hidden)
    shape = tuple(first.shape)
    parts: list[nn.Module] = []
    if settings.resolution is not None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 4:
            fault = f"`critic.resolution` {settings.resolution} is for images, not for shape {shape}"
            raise critic_unfit(context, fault, option="critic.resolution")
        parts.append(PoolTo(settings.resolution))
    if settings.width < 1:
        if not isinstance(hidden, Tensor) or hidden.dim() not in {3, 4}:
            fault = f"`critic.width` {settings.width} is for images and tokens, not for shape {shape}"
            raise critic_unfit(context, fault, option="critic.width")
        channels = _channels(hidden)
        fewer = _narrowed(channels, settings.width)
        parts.append(nn.Conv2d(channels, fewer, 1) if hidden.dim() == 4 else nn.Linear(channels, fewer))
    if not parts:
        return nn.Identity()
    return nn.Sequential(*parts).to(device=first.device, dtype=first.dtype)


def _narrowed(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _shapes(payload: Payload) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in as_tuple(payload))


def _channels(payload: Payload) -> int:
    """Return the channels of an image, or the width of anything else."""
    first = first_tensor(payload)
    return first.shape[1 if first.dim() == 4 else -1]


def _copy_for(settings: AuglocalCritic, context: CriticContext, index: int, current: Payload) -> nn.Module:
    """Return a copy of layer `index` that takes `current`: with the network's weights, or fresh ones."""
    layer = context.layers[index]
    wanted = context.hiddens[index - context.boundary]
    after = context.hiddens[index + 1 - context.boundary]
    if _shapes(wanted) == _shapes(current) and settings.width == 1:
        return fresh_copy(layer, str(index)) if settings.weights == "fresh" else trainable_copy(layer)
    rebuild: Callable[..., nn.Module] | None = getattr(layer, "auglocal_copy", None)
    can_rebuild = isinstance(current, Tensor) and current.dim() in {3, 4} and settings.weights == "fresh"
    if rebuild is None or not can_rebuild:
        remedy = "choose `critic.weights` fresh"
        if settings.weights == "fresh":
            remedy = "give the layer a method auglocal_copy(in_channels, stride, out_channels)"
        raise UsageError(
            f"stage {context.stage}: the auglocal critic cannot put a copy of layer {index} ({type(layer).__name__}) "
            f"on shape {_shapes(current)[0]}, it takes {_shapes(wanted)[0]}; {remedy}, raise `critic.depth` so that no "
            "layer is skipped, or choose `critic.kind` head",
            code="layer-not-copyable",
            key="critic.kind",
        )
    channels = _channels(current)
    wider = _narrowed(_channels(after), settings.width)
    stride = 2 if wider > channels else 1
    # The layer's own method built it, yet it is made fresh like any other: it may hold parts of the network.
    rebuilt = make_fresh(rebuild(channels, stride, wider), str(index))
    return rebuilt.to(device=first_tensor(current).device, dtype=first_tensor(current).dtype)


@torch.no_grad()
def _run(module: nn.Module, current: Payload, name: str) -> Payload:
    """Run a part of the critic on a sample, in eval mode: training mode would change statistics and draw dropout."""
    module.eval()
    try:
        return check_payload(module(map_payload(torch.clone, current)), f"{name} returned")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{name} fails on shape {_shapes(current)[0]}: {first_line(error)}; "
            "correct its auglocal_copy or choose `critic.kind` head",
            code="critic-fails",
            key="critic.kind",
        ) from error
    finally:
        module.train()
