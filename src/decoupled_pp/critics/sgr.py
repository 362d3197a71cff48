"""SGR: draws a stage's gradient for its input towards the previous stage's own delta (Yang et al. 2024).

The delta is the gradient of a stage's local loss for its output. It travels forward beside the activations, which
doubles the bytes of a link; nothing flows back. The packet leaves once the critic has computed the delta.

Legend: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.objective import Critic, CriticContext, View
from decoupled_pp.core.packets import Loss, Payload, as_tuple, first_tensor
from decoupled_pp.critics.requirements import judged_tensor
from decoupled_pp.critics.several import build_bases
from decoupled_pp.settings.critics import SgrCritic

_EPSILON = 1e-12  # a delta may be all zeros, where every sample is learnt


class Sgr(Critic):
    """An ordinary critic with SGR's objective: stage output -> logits.

    The objective needs a second derivative through the stage's layers.
    """

    late = True
    follows_input = True

    def __init__(self, base: nn.Module, settings: SgrCritic) -> None:
        super().__init__()
        self.base = base
        self.weight = settings.weight
        self.kind = settings.distance

    def forward(self, hidden: Payload) -> Tensor:
        """Judge a stage's output."""
        logits: Tensor = self.base(hidden)
        return logits

    def objective(self, view: View, loss: Loss) -> Tensor:
        """Return L_k + lambda d(dL_k/dh_{k-1}, sg(dL_{k-1}/dh_{k-1})), L_k the run's loss of this critic's logits."""
        label_loss = loss(self(view.hidden), view.target)
        hidden = first_tensor(view.hidden)
        has_predecessor = len(as_tuple(view.rider)) > 0
        # The distance is differentiated through both gradients; the first stage has no distance, and needs no graph.
        if not hidden.requires_grad:
            raise _without_gradient()
        (delta,) = torch.autograd.grad(label_loss, hidden, retain_graph=True, create_graph=has_predecessor)
        view.delta = delta.detach()  # the rider: it leaves with the packet, without the graph
        if not has_predecessor:
            return label_loss
        (ours,) = torch.autograd.grad(hidden, first_tensor(view.inputs), delta, create_graph=True, allow_unused=True)
        if ours is None:
            raise _without_gradient()
        return label_loss + self.weight * self._distance(ours, first_tensor(view.rider))

    def rider(self, view: View) -> Payload:
        """Return the gradient of this stage's own loss for its output, shaped like it."""
        return view.delta

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        ours = ours.flatten(1)
        theirs = theirs.flatten(1)
        if self.kind == "cosine":
            return (1 - functional.cosine_similarity(ours, theirs, dim=1, eps=_EPSILON)).mean()
        return ((ours - theirs).square().sum(dim=1) / (theirs.square().sum(dim=1) + _EPSILON)).mean()


class LastStageSgr(Sgr):
    """SGR's objective after the last stage, whose output is the logits: no layers, and nothing is sent on."""

    late = False

    def __init__(self, settings: SgrCritic) -> None:
        super().__init__(_FirstTensor(), settings)

    def rider(self, view: View) -> Payload:
        """Return nothing: no stage follows."""
        return ()


class _FirstTensor(nn.Module):
    def forward(self, hidden: Payload) -> Tensor:
        return first_tensor(hidden)


def _without_gradient() -> UsageError:
    return UsageError(
        "critic sgr differentiates through its stage, and a layer of it passes no gradient on (detach, no_grad, whole "
        "numbers); choose `critic.kind` head, or `cut` elsewhere",
        code="critic-needs-gradient",
        key="critic.kind",
    )


def build_sgr(settings: SgrCritic, context: CriticContext) -> Sgr:
    """Build the SGR critic of one stage before the last.

    Source: Yang et al. 2024 (ICML), "Towards interpretable deep local learning with successive gradient
    reconciliation". The paper leaves the distance open; neither distance here depends on the deltas' scale.
    """
    judged_tensor("sgr", context)
    return Sgr(build_bases(settings.base, 1, context)[0], settings)
