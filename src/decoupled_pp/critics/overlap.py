"""Overlap: a stage trains copies of the next stage's first layers redundantly; its critic judges their output.

    stage k        f_k --> copies of the next stage's first layers --> critic      all trained by stage k
    stage k+1              the layers themselves, trained by stage k+1 --> ...

A stage then learns features that layers like the next stage's can use. The copies begin with the network's weights and
train on their own: nothing is exchanged, no byte more crosses a link, and the price is computing those layers twice.

Source: overlapping local updates, Laskin et al. 2020 (2012.03837), section 3, where the layers are shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticBuilder, CriticContext, View, has_exit
from decoupled_pp.core.packets import Loss, Payload
from decoupled_pp.critics.fresh import trainable_copy


class PlainOverlap(nn.Module):
    """Copied layers, then a critic: by itself a plain one, which lowers the run's loss and can learn in a cascade."""

    def __init__(self, layers: nn.Sequential, critic: nn.Module) -> None:
        super().__init__()
        self.overlap = layers
        self.critic = critic

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.critic(self.overlap(hidden))
        return logits


class Overlap(PlainOverlap, Critic):
    """Copied layers, then a critic with an objective of its own."""

    critic: Critic

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return the critic's objective, for what the copied layers make of the stage's output."""
        return self.critic.objective(replace(view, hidden=self.overlap(view.hidden)), loss)

    def rider(self, view: View) -> Payload:
        """Return the critic's rider."""
        return self.critic.rider(view)


@dataclass(frozen=True)
class OverlapBuilder:
    """Builds overlapping critics."""

    builder: CriticBuilder  # of the critics behind the copied layers
    layers: int  # how many are copied; fewer where the network's head is nearer

    def __call__(self, context: CriticContext) -> nn.Module:
        """Build the critic of one stage."""
        end = min(context.boundary + self.layers, len(context.layers) - 1)
        copies = nn.Sequential(*(trainable_copy(layer) for layer in context.layers[context.boundary : end]))
        above = context.hiddens[end - context.boundary :]
        critic = self.builder(replace(context, boundary=end, hidden=above[0], hiddens=above))
        if not isinstance(critic, Critic):
            return PlainOverlap(copies, critic)
        if critic.late or critic.follows_input or critic.needs_first or not has_exit(critic):
            raise UsageError(
                f"`critic_overlap`: critic {type(critic).__name__} looks at the stage's own input or gradient, not at "
                "layers behind it; leave `critic_overlap` out",
                code="critic-overlap-unsupported",
                key="critic_overlap",
            )
        return Overlap(copies, critic)

    def closing(self) -> nn.Module | None:
        """Build what judges the last stage as the builder does: behind it there is nothing to overlap."""
        own: Callable[[], nn.Module | None] = getattr(self.builder, "closing", lambda: None)
        return own()
