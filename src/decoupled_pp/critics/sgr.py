"""SGR: a stage's gradient for its input is drawn towards the previous stage's own delta (Yang et al. 2024).

The delta travels forward beside the activations, which doubles the bytes of a link; nothing flows back. The packet
leaves once the critic has computed it. Legend: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, as_tuple, first_tensor
from decoupled_pp.critics.labels import judged_tensor
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import SgrCritic

_EPSILON = 1e-12


class Sgr(Critic):
    """Stage output -> logits of an ordinary critic; or, after the last stage, the network's own logits.

    The objective needs a second derivative through the stage's layers.
    """

    late = True
    follows_input = True

    def __init__(self, base: nn.Module, settings: SgrCritic) -> None:
        super().__init__()
        self.base, self.weight, self.kind = base, settings.weight, settings.distance

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.base(hidden)
        return logits

    def objective(self, view: View, loss: Loss) -> Tensor:
        """L_k + lambda d(dL_k/dh_{k-1}, sg(dL_{k-1}/dh_{k-1})), L_k the run's loss of this critic's logits."""
        label = loss(self(view.hidden), view.target)
        hidden, follows = first_tensor(view.hidden), len(as_tuple(view.rider)) > 0
        (delta,) = torch.autograd.grad(label, hidden, retain_graph=True, create_graph=follows)
        view.delta = delta.detach()
        if not follows:
            return label
        (ours,) = torch.autograd.grad(hidden, first_tensor(view.inputs), delta, create_graph=True)
        return label + self.weight * self._distance(ours, first_tensor(view.rider))

    def rider(self, view: View) -> Payload:
        """The gradient of this stage's own loss for its output, shaped like it."""
        return view.delta

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = ours.flatten(1), theirs.flatten(1)
        if self.kind == "cosine":
            return (1 - functional.cosine_similarity(ours, theirs, dim=1, eps=_EPSILON)).mean()
        return ((ours - theirs).square().sum(dim=1) / (theirs.square().sum(dim=1) + _EPSILON)).mean()


class Closing(Sgr):
    """After the last stage, whose output is the logits: no layers, the same objective, and nothing is sent on."""

    late = False

    def __init__(self, settings: SgrCritic) -> None:
        super().__init__(_First(), settings)

    def rider(self, view: View) -> Payload:
        """Nothing."""
        return ()


class _First(nn.Module):
    def forward(self, hidden: Payload) -> Tensor:
        return first_tensor(hidden)


def build_sgr(settings: SgrCritic, context: CriticContext) -> Sgr:
    """The SGR critic of one stage before the last.

    Raises:
        UsageError: The stage's output is neither an image nor a vector, or the network's is not (B, K).

    Source: Yang et al. 2024 (ICML), "Towards interpretable deep local learning with successive gradient
    reconciliation"; the distance is ours to choose, both are free of the deltas' scale.
    """
    judged_tensor("sgr", context)
    return Sgr(build_bases(settings.base, 1, context)[0], settings)
