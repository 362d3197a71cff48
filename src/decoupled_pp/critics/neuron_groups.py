"""GN-DGL: a stage's channels in groups, a critic for each, and a term that keeps them apart (Patel et al. 2023).

Legend: B batch, C channels, G groups, K classes.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, first_tensor
from decoupled_pp.critics.labels import class_indices, judged_tensor
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import NeuronGroupsCritic


def wrong_classes(logits: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """(B, K): softened probabilities of the classes that are not the sample's, which sum to 1; 0 for its own."""
    own = functional.one_hot(classes, logits.shape[-1]).bool()
    return (logits / temperature).masked_fill(own, -torch.inf).softmax(dim=-1)


class NeuronGroups(Critic):
    """(B, C, ...) -> the mean of G critics' logits, (B, K). The gradient of each stays in its own C / G channels."""

    def __init__(self, critics: list[nn.Module], settings: NeuronGroupsCritic) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)
        self.diversity, self.temperature = settings.diversity, settings.temperature

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output: what the groups say on average."""
        return torch.stack(self._all(first_tensor(hidden))).mean(dim=0)

    def objective(self, view: View, loss: Loss) -> Tensor:
        """The sum of the groups' losses, and w times the mean pairwise cosine of their wrong-class distributions."""
        every = self._all(first_tensor(view.hidden))
        classes = class_indices("neuron_groups", view.target, every[0])
        wrong = [wrong_classes(logits, classes, self.temperature) for logits in every]
        alike = [functional.cosine_similarity(a, b, dim=-1).mean() for a, b in combinations(wrong, 2)]
        losses = [loss(logits, view.target) for logits in every]
        return torch.stack(losses).sum() + self.diversity * torch.stack(alike).mean()

    def _all(self, hidden: Tensor) -> list[Tensor]:
        parts = hidden.chunk(len(self.critics), dim=1)
        seen = [
            torch.cat([part if i == own else part.detach() for i, part in enumerate(parts)], dim=1)
            for own in range(len(parts))
        ]
        return [critic(one) for critic, one in zip(self.critics, seen, strict=True)]


def build_neuron_groups(settings: NeuronGroupsCritic, context: CriticContext) -> NeuronGroups:
    """The grouped critic of one stage.

    Raises:
        UsageError: The stage's output is neither an image nor a vector, its channels do not divide by the groups, or
            the network's output is not (B, K) with at least 3 classes.

    Source: Patel et al. 2023 (2301.07635), section 4.
    """
    hidden, outputs = judged_tensor("neuron_groups", context), context.output.shape[1]
    if hidden.shape[1] % settings.groups:
        raise UsageError(
            f"stage {context.stage}: its {hidden.shape[1]} channels do not divide into {settings.groups} groups; "
            "change critic.groups"
        )
    if outputs < 3:
        raise UsageError(f"critic neuron_groups compares wrong classes, of which {outputs} classes leave one: use head")
    return NeuronGroups(build_bases(settings.base, settings.groups, context), settings)
