"""Says which part of a stage learns at which optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Pace:
    """Says when one stage learns.

    Attributes:
        begins: Optimizer steps before the stage learns; until then it only passes packets on (`training.stagger`).
        critic_warmup: Optimizer steps at the start in which only the critic learns, where there is one.
    """

    begins: int = 0
    critic_warmup: int = 0

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
            module.requires_grad_(False).eval()
