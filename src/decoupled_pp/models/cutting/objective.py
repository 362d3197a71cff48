"""The scalar that is differentiated when a layer or a critic is measured without real targets."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decoupled_pp.core.objective import CriticContext, View, judge_of
from decoupled_pp.core.packets import Loss, Payload, as_tuple, map_payload
from decoupled_pp.models.cutting.closing import loss_of_critic


@dataclass(frozen=True)
class Objective:
    """A loss with a made-up target that fits."""

    loss: Loss
    target: Payload
    relearned: bool = False  # critics run forward once more, to learn from the next stage's losses (`critic_target`)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the loss of these logits."""
        return self.loss(logits, _moved(self.target, logits.device))


class CriticWithLoss(nn.Module):
    """A critic with the loss that its stage lowers, as one module: hidden -> scalar."""

    def __init__(self, critic: nn.Module, context: CriticContext, objective: Objective) -> None:
        super().__init__()
        self.critic = critic
        self._objective = objective
        self._loss = loss_of_critic(objective.loss, critic, context)
        self._sample = context.sample

    def forward(self, hidden: Payload) -> Tensor:
        """Return the local loss on a made-up target.

        The network's input stands in for the stage's input and for the rider. A critic that differentiates through the
        stage's layers is measured without that part, because the layers are not here.
        """
        device = as_tuple(hidden)[0].device
        target = _moved(self._objective.target, device)
        sample = _moved(self._sample, device)
        judge = judge_of(self.critic)
        view = View(sample, hidden, target, rider=() if judge.follows_input else sample)
        return judge.objective(view, self._loss)


def stand_in_objective(loss: Loss | None, output: Tensor, *, relearned: bool = False) -> Objective:
    """Return `loss` with a made-up target that fits, so that its cost is measured too.

    The loss counts: with a large vocabulary it is a good part of the last layer's time. Two targets are tried: class
    indices shaped like the output without its last dimension, then values shaped like the output. A loss that takes
    neither, or None, is replaced by the mean square of the output.
    """
    if loss is not None:
        indices = torch.zeros(output.shape[:-1], dtype=torch.int64, device=output.device)
        for target in (indices, torch.zeros_like(output)):
            if _accepts(loss, output, target):
                return Objective(loss, target, relearned)
    return Objective(_mean_square, (), relearned)


def _moved(payload: Payload, device: torch.device) -> Payload:
    return map_payload(lambda tensor: tensor.to(device), payload)


def _mean_square(logits: Tensor, _: Payload) -> Tensor:
    return logits.float().square().mean()


def _accepts(loss: Loss, output: Tensor, target: Tensor) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # mse_loss only warns of a target that it broadcasts
            return loss(output, target).dim() == 0
    except Exception:  # a user's function may raise anything at a target it was not made for
        return False
