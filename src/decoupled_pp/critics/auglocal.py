"""AugLocal: the critic is a fresh copy of layers sampled uniformly from those above the stage (Ma et al. 2024).

Notation of the paper, used below: n layers (the network's without its head), l the index of the stage's last layer,
K stages, d the depth of a critic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import CriticContext
from decoupled_pp.core.packets import Payload, as_tuple, check_payload, first_tensor, map_payload
from decoupled_pp.critics.fresh import fresh_copy, make_fresh, trainable_copy
from decoupled_pp.critics.head import matching_head, own_head
from decoupled_pp.settings.critics import AuglocalCritic


def pyramidal_depth(depth: int, pyramid: float, stage: int, stages: int) -> int:
    """Depth of the critic of one stage: deeper near the input.

    max(1, round(d(1 - c s) + c s)) with s = stage / (K - 2), the position among the K - 1 critics (0 if there is one).

    Args:
        depth: d, the depth at the first stage.
        pyramid: c, the share taken off linearly towards the last critic.
        stage: Index of the stage, 0 .. K-2.
        stages: K.

    Source: Ma et al. 2024, section 3.3 (pyramidal depth), minimal depth 1.
    """
    position = stage / (stages - 2) if stages > 2 else 0.0
    return max(1, round(depth * (1 - pyramid * position) + pyramid * position))


def sampled_indices(last: int, layers: int, depth: int) -> tuple[int, ...]:
    """Indices of the layers a critic copies: round(l + (n-l-1)/d i), i = 1..d; all that remain if d >= n-1-l.

    Args:
        last: l, index of the stage's last layer.
        layers: n, the number of layers, the head not counted.
        depth: d.

    Returns:
        Strictly increasing indices in l+1 .. n-1, the last always n-1; empty if nothing remains above the stage.

    Source: Ma et al. 2024, section 3.2 (uniform selection).
    """
    remaining = layers - 1 - last
    if depth >= remaining:
        return tuple(range(last + 1, layers))
    return tuple(round(last + remaining / depth * i) for i in range(1, depth + 1))


class AuglocalChain(nn.Module):
    """What narrows the stage's output, copied layers, then a head: a stage's output -> logits."""

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


class PoolTo(nn.Module):
    """Average-pool images to at most so many rows and columns: (B, C, H, W) -> (B, C, min(H, r), min(W, r))."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, image: Tensor) -> Tensor:
        """Pool."""
        height, width = (min(side, self.resolution) for side in image.shape[-2:])
        return functional.adaptive_avg_pool2d(image, (height, width))


def _narrowing(settings: AuglocalCritic, context: CriticContext) -> nn.Module:
    """What comes before the copies: pooling to `resolution`, and a projection to `width` of the channels.

    Raises:
        UsageError: The stage's output has no such dimensions.
    """
    hidden = context.hidden
    parts: list[nn.Module] = []
    if settings.resolution is not None:
        if not _is_image(hidden):
            raise _cannot(context, f"resolution {settings.resolution} is for images, not for {_shapes(hidden)[0]}")
        parts.append(PoolTo(settings.resolution))
    if settings.width < 1:
        if not isinstance(hidden, Tensor) or hidden.dim() not in {3, 4}:
            raise _cannot(context, f"width {settings.width} is for images and tokens, not for {_shapes(hidden)[0]}")
        channels, fewer = _channels(hidden), _narrowed(_channels(hidden), settings.width)
        parts.append(nn.Conv2d(channels, fewer, 1) if hidden.dim() == 4 else nn.Linear(channels, fewer))
    first = first_tensor(hidden)
    return nn.Sequential(*parts).to(device=first.device, dtype=first.dtype) if parts else nn.Identity()


def _cannot(context: CriticContext, fault: str) -> UsageError:
    return UsageError(f"stage {context.stage}: critic auglocal: {fault}; leave it out or choose critic.kind head")


def _narrowed(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _shapes(payload: Payload) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in as_tuple(payload))


def _is_image(payload: Payload) -> bool:
    return isinstance(payload, Tensor) and payload.dim() == 4


def _channels(payload: Payload) -> int:
    """Channels of an image, width of anything else."""
    first = first_tensor(payload)
    return first.shape[1 if first.dim() == 4 else -1]


def _copy_for(settings: AuglocalCritic, context: CriticContext, index: int, current: Payload) -> nn.Module:
    """A copy of layer `index` that takes `current`: with the network's weights, or fresh."""
    layer = context.layers[index]
    wanted, after = context.hiddens[index - context.boundary], context.hiddens[index + 1 - context.boundary]
    if _shapes(wanted) == _shapes(current) and settings.width == 1:
        return fresh_copy(layer, str(index)) if settings.weights == "fresh" else trainable_copy(layer)
    rebuild: Callable[..., nn.Module] | None = getattr(layer, "auglocal_copy", None)
    fits = isinstance(current, Tensor) and current.dim() in {3, 4} and settings.weights == "fresh"
    if rebuild is None or not fits:
        method = "give the layer a method auglocal_copy(in_channels, stride, out_channels), "
        remedy = method if settings.weights == "fresh" else "choose critic.weights fresh, "
        raise UsageError(
            f"stage {context.stage}: the auglocal critic cannot put a copy of layer {index} ({type(layer).__name__}) "
            f"on shape {_shapes(current)[0]}, it takes {_shapes(wanted)[0]}; {remedy}raise critic.depth so that no "
            "layer is skipped, or choose critic.kind head"
        )
    channels, wider = _channels(current), _narrowed(_channels(after), settings.width)
    stride = 2 if wider > channels else 1
    # Of the layer's own making, but made fresh like any other: it may hold parts it took from the network.
    rebuilt = make_fresh(rebuild(channels, stride, wider), str(index))
    return rebuilt.to(device=first_tensor(current).device, dtype=first_tensor(current).dtype)


@torch.no_grad()
def _run(module: nn.Module, current: Payload, what: str) -> Payload:
    """What a part of the critic makes of a sample; eval mode, so that it leaves statistics and generators alone."""
    module.eval()
    try:
        return check_payload(module(map_payload(torch.clone, current)), what)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UsageError(
            f"{what} fails on shape {_shapes(current)[0]}: {reason}; "
            "correct its auglocal_copy or choose critic.kind head"
        ) from error
    finally:
        module.train()


def build_auglocal(settings: AuglocalCritic, context: CriticContext) -> nn.Module:
    """The AugLocal critic of one stage: sampled layers, freshly initialised, then the matching head.

    A sampled layer whose input in the network is shaped like what it is given here is copied as it is; else it is
    rebuilt by its method `auglocal_copy(in_channels, stride, out_channels)`, with stride 2 where it widens its input.

    `weights: network` departs from the paper: copies and head begin as the network's own are, for a network that is
    trained already.

    Raises:
        UsageError: A sampled layer can be neither copied nor rebuilt.

    Source: Ma et al. 2024 (ICLR), section 3.
    """
    layers = len(context.layers) - 1  # without the head
    if len(context.hiddens) != len(context.layers) - context.boundary:
        raise UsageError(
            f"stage {context.stage}: critic auglocal needs CriticContext.hiddens, the input of each of the "
            f"{len(context.layers) - context.boundary} layers above, but got {len(context.hiddens)}; trace the network"
        )
    depth = pyramidal_depth(settings.depth, settings.pyramid, context.stage, context.stages)
    where = f"stage {context.stage}: the auglocal critic's"
    narrowing = _narrowing(settings, context)
    current = _run(narrowing, context.hidden, f"{where} narrowing")
    copies: list[nn.Module] = []
    for index in sampled_indices(context.boundary - 1, layers, depth):
        copies.append(_copy_for(settings, context, index, current))
        current = _run(copies[-1], current, f"{where} copy of layer {index} ({type(context.layers[index]).__name__})")
    if settings.weights == "network":
        return AuglocalChain(narrowing, copies, own_head(context, current))
    return AuglocalChain(narrowing, copies, matching_head(current, context.output, context.stage))
