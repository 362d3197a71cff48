"""Several heads on one stage that learn from the labels and from each other's consensus (Song & Chai 2018).

Legend: B batch, H heads, K classes, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.criterion import classes_in
from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, as_tuple, map_payload, takes_gradient
from decoupled_pp.critics.requirements import ignored_by, share
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import CollaborativeCritic


class Collaborative(Critic):
    """Heads side by side: stage output -> the mean of H heads' logits."""

    def __init__(self, heads: list[nn.Module], settings: CollaborativeCritic, class_dim: int | None = None) -> None:
        super().__init__()
        self.class_dim = class_dim
        self.heads = nn.ModuleList(heads)
        self.share = settings.label_share
        self.temperature = settings.temperature

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output by the average of the heads."""
        return torch.stack([head(hidden) for head in self.heads]).mean(dim=0)

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return sum over h of b loss(z_h, y) + (1 - b) T^2 CE(softmax(mean of the others' z / T), softmax(z_h / T)).

        The consensus takes no gradient, and the gradient into the stage is 1/H of the sum's: otherwise it would grow
        with the number of heads.
        """
        count = len(self.heads)
        every = []
        for head in self.heads:
            every.append(head(map_payload(lambda tensor: _with_scaled_gradient(tensor, 1 / count), view.hidden)))
        total: Tensor = every[0].new_zeros(())
        for number, logits in enumerate(every):
            others = every[:number] + every[number + 1 :]
            consensus = torch.stack([other.detach() for other in others]).mean(dim=0)
            total = total + self.share * loss(logits, view.target)
            total = total + (1 - self.share) * self._consensus_loss(logits, consensus, view.target, loss)
        return total

    def _consensus_loss(self, logits: Tensor, consensus: Tensor, target: Payload, loss: Loss) -> Tensor:
        dim = classes_in(logits, self.class_dim)
        soft_targets = (consensus / self.temperature).softmax(dim)
        log_probabilities = functional.log_softmax(logits / self.temperature, dim)
        each: Tensor = -(soft_targets * log_probabilities).sum(dim)
        counted = as_tuple(target)[0] != ignored_by(loss)
        if counted.shape == each.shape:  # class indices; else every position counts
            each = each * counted / share(counted, each)
        # Softening divides the gradient by about the square.
        return each.mean() * self.temperature**2


def _with_scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Return the tensor's values; its gradient is multiplied by `factor`."""
    if not takes_gradient(tensor):
        return tensor
    return tensor.detach() + factor * (tensor - tensor.detach())


def build_collaborative(settings: CollaborativeCritic, context: CriticContext) -> Collaborative:
    """Build the heads of one stage.

    Source: Song & Chai 2018 (NeurIPS, 1805.11761), equations 2 to 5 and section 3.3 (backpropagation rescaling).
    """
    return Collaborative(build_bases(settings.base, settings.heads, context), settings, context.class_dim)
