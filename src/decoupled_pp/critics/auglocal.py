"""AugLocal: the critic is a fresh copy of layers sampled uniformly from those above the stage (Ma et al. 2024).

Notation of the paper, used below: n layers (the network's without its head), l the index of the stage's last layer,
K stages, d the depth of a critic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decoupled_pp.contracts import (
    CriticContext,
    Payload,
    UsageError,
    as_tuple,
    check_payload,
    first_tensor,
    map_payload,
)
from decoupled_pp.critic_sections import AuglocalCritic
from decoupled_pp.critics.fresh import fresh_copy, make_fresh
from decoupled_pp.critics.head import matching_head


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
    """Copied layers, then a head: what goes into the network's next layer -> logits."""

    def __init__(self, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def _shapes(payload: Payload) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in as_tuple(payload))


def _is_image(payload: Payload) -> bool:
    return isinstance(payload, Tensor) and payload.dim() == 4


def _copy_for(context: CriticContext, index: int, current: Payload) -> nn.Module:
    """A fresh copy of layer `index` that takes `current`."""
    layer = context.layers[index]
    name = f"{index} ({type(layer).__name__})"
    wanted, after = context.hiddens[index - context.boundary], context.hiddens[index + 1 - context.boundary]
    if _shapes(wanted) == _shapes(current):
        return fresh_copy(layer, str(index))
    rebuild: Callable[[int, int], nn.Module] | None = getattr(layer, "auglocal_copy", None)
    if rebuild is None or not (_is_image(current) and _is_image(after)):
        raise UsageError(
            f"stage {context.stage}: the auglocal critic cannot put a copy of layer {name} on shape "
            f"{_shapes(current)[0]}, it takes {_shapes(wanted)[0]}; give the layer a method auglocal_copy(in_channels, "
            "stride), raise critic.depth so that no layer is skipped, or choose critic.kind head"
        )
    channels = first_tensor(current).shape[1]
    stride = 2 if first_tensor(after).shape[1] > channels else 1
    # Of the layer's own making, but made fresh like any other: it may hold parts it took from the network.
    rebuilt = make_fresh(rebuild(channels, stride), str(index))
    return rebuilt.to(device=first_tensor(current).device, dtype=first_tensor(current).dtype)


@torch.no_grad()
def _run(copied: nn.Module, current: Payload, context: CriticContext, index: int) -> Payload:
    """What the copy makes of a sample; eval mode, so that it leaves statistics and generators alone."""
    what = f"stage {context.stage}: the auglocal critic's copy of layer {index} ({type(copied).__name__})"
    copied.eval()
    try:
        return check_payload(copied(map_payload(torch.clone, current)), what)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UsageError(
            f"{what} fails on shape {_shapes(current)[0]}: {reason}; "
            "correct its auglocal_copy or choose critic.kind head"
        ) from error
    finally:
        copied.train()


def build_auglocal(settings: AuglocalCritic, context: CriticContext) -> nn.Module:
    """The AugLocal critic of one stage: sampled layers, freshly initialised, then the matching head.

    A sampled layer whose input in the network is shaped like what it is given here is copied as it is; else it is
    rebuilt by its method `auglocal_copy(in_channels, stride)`, with stride 2 where its output is wider than its input.

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
    current = context.hidden
    copies: list[nn.Module] = []
    for index in sampled_indices(context.boundary - 1, layers, depth):
        copies.append(_copy_for(context, index, current))
        current = _run(copies[-1], current, context, index)
    return AuglocalChain(copies, matching_head(current, context.output, context.stage))
