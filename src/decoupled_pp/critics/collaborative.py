"""Several heads on one stage that learn from the labels and from each other's consensus (Song & Chai 2018).

Legend: B batch, H heads, K classes, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, map_payload
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import CollaborativeCritic


class Collaborative(Critic):
    """Stage output -> the mean of H heads' logits."""

    def __init__(self, heads: list[nn.Module], settings: CollaborativeCritic) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.share, self.temperature = settings.label_share, settings.temperature

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output: what the heads say on average."""
        return torch.stack([head(hidden) for head in self.heads]).mean(dim=0)

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Sum over h of b loss(z_h, y) + (1 - b) T^2 CE(softmax(mean of the others' z / T), softmax(z_h / T)).

        The consensus takes no gradient, and the gradient into the stage is 1/H of the sum's.
        """
        count = len(self.heads)
        every = [head(map_payload(lambda tensor: _rescaled(tensor, 1 / count), view.hidden)) for head in self.heads]
        total: Tensor = every[0].new_zeros(())
        for number, logits in enumerate(every):
            others = torch.stack([one.detach() for one in every[:number] + every[number + 1 :]]).mean(dim=0)
            total = total + self.share * loss(logits, view.target)
            total = total + (1 - self.share) * self._consensus_loss(logits, others)
        return total

    def _consensus_loss(self, logits: Tensor, others: Tensor) -> Tensor:
        soft = (others / self.temperature).softmax(dim=-1)
        log_ours = functional.log_softmax(logits / self.temperature, dim=-1)
        cross: Tensor = -(soft * log_ours).sum(dim=-1).mean()
        return cross * self.temperature**2


def _rescaled(tensor: Tensor, factor: float) -> Tensor:
    """The same values, with a gradient times `factor`."""
    return tensor.detach() + factor * (tensor - tensor.detach()) if tensor.is_floating_point() else tensor


def build_collaborative(settings: CollaborativeCritic, context: CriticContext) -> Collaborative:
    """The heads of one stage.

    Raises:
        UsageError: No such head fits the stage.

    Source: Song & Chai 2018 (NeurIPS, 1805.11761), equations 2 to 5 and section 3.3 (backpropagation rescaling).
    """
    return Collaborative(build_bases(settings.base, settings.heads, context), settings)
