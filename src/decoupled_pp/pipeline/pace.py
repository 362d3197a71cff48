"""Says which part of a stage learns at which optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Pace:
    """Says when one stage learns."""

    begins: int = 0  # optimizer steps in which the stage only passes packets on (`training.stagger`)
    critic_warmup: int = 0  # optimizer steps at the start in which only the critic learns, where there is one

    def has_begun(self, steps: int) -> bool:
        """Return whether the stage learns at all after so many optimizer steps."""
        return steps >= self.begins

    def warms_critic(self, steps: int) -> bool:
        """Return whether only the critic learns after so many optimizer steps."""
        return steps < self.critic_warmup

    @staticmethod
    def freeze(*modules: nn.Module) -> None:
        """Let these modules stay as they are: no gradients, evaluation mode."""
        for module in modules:
            module.requires_grad_(False).eval()  # evaluation mode too: batch-norm statistics would go on moving
