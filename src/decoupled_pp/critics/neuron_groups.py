"""GN-DGL: divides a stage's channels into groups with a critic each, kept apart by a term (Patel et al. 2023).

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
from decoupled_pp.critics.requirements import (
    class_indices,
    critic_unfit,
    ignored_by,
    judged_tensor,
    share,
)
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import NeuronGroupsCritic


def wrong_classes(logits: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Return (B, K): softened probabilities of the other classes, which sum to 1; 0 for the sample's own."""
    own = functional.one_hot(classes, logits.shape[-1]).bool()
    # Taken out before the softmax, so that a confident sample's other classes are not rounded to nothing.
    return (logits / temperature).masked_fill(own, -torch.inf).softmax(dim=-1)


class NeuronGroups(Critic):
    """Critics side by side: (B, C, ...) -> the mean of G critics' logits, (B, K).

    The gradient of each stays in its own C / G channels.
    """

    def __init__(self, critics: list[nn.Module], settings: NeuronGroupsCritic) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)
        self.diversity = settings.diversity
        self.temperature = settings.temperature

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output by the average of the groups."""
        return torch.stack(self._all_logits(first_tensor(hidden))).mean(dim=0)

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return the groups' losses plus w times the mean pairwise cosine of their wrong-class distributions."""
        every = self._all_logits(first_tensor(view.hidden))
        classes = class_indices("neuron_groups", view.target, every[0])
        counted = classes != ignored_by(loss)
        wrong = [wrong_classes(logits, classes * counted, self.temperature) for logits in every]
        pairs = combinations(wrong, 2)
        similarities = [(functional.cosine_similarity(a, b, dim=-1) * counted).mean() for a, b in pairs]
        losses = [loss(logits, view.target) for logits in every]
        return torch.stack(losses).sum() + self.diversity * torch.stack(similarities).mean() / share(counted, every[0])

    def _all_logits(self, hidden: Tensor) -> list[Tensor]:
        """Return every critic's logits; each sees all channels, and only its own take its gradient."""
        parts = hidden.chunk(len(self.critics), dim=1)
        # Detached, not cut out: each critic judges with all channels and trains only its own.
        every = []
        for own, critic in enumerate(self.critics):
            seen = [part if index == own else part.detach() for index, part in enumerate(parts)]
            every.append(critic(torch.cat(seen, dim=1)))
        return every


def build_neuron_groups(settings: NeuronGroupsCritic, context: CriticContext) -> NeuronGroups:
    """Build the grouped critic of one stage.

    Source: Patel et al. 2023 (2301.07635), section 4.
    """
    hidden = judged_tensor("neuron_groups", context)
    classes = context.output.shape[1]
    if hidden.shape[1] % settings.groups:
        raise UsageError(
            f"stage {context.stage}: its {hidden.shape[1]} channels do not divide into {settings.groups} groups; "
            "change `critic.groups`",
            code="channels-not-divisible",
            key="critic.groups",
        )
    if classes < 3:
        raise critic_unfit(
            context, f"critic neuron_groups compares wrong classes, and {classes} classes leave fewer than two"
        )
    return NeuronGroups(build_bases(settings.base, settings.groups, context), settings)
