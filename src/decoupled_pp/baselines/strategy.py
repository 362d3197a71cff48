"""What all baselines share: one rank's part in one optimizer step of the whole network, trained by backpropagation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decoupled_pp.contracts import Batch, Loss, Payload, Plan
from decoupled_pp.optim import OptimizerFactory, build_optimizers, build_schedules
from decoupled_pp.settings import OptimizerSettings, ScheduleSettings


@dataclass(frozen=True)
class Training:
    """How a baseline trains; the same fields that a decoupled run takes.

    Attributes:
        loss: loss(logits, target) -> scalar, the mean over a micro-batch.
        optimizer: Of every part of the network.
        schedule: Learning-rate schedule.
        steps: Optimizer steps that the schedule spans.
        clip_norm: Largest norm of the whole network's gradient, or None.
        precision: "fp32" or "bf16" (autocast).
    """

    loss: Loss
    optimizer: OptimizerSettings | OptimizerFactory
    schedule: ScheduleSettings
    steps: int
    clip_norm: float | None = None
    precision: str = "fp32"

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that forward and loss run in."""
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Part(nn.Module):
    """A run of layers as torch's wrappers call it: a payload of several tensors comes as several arguments."""

    def __init__(self, layers: nn.Module, training: Training, device: torch.device) -> None:
        """Take over the layers, already on `device`."""
        super().__init__()
        self.layers = layers
        self._training, self._device = training, device

    def forward(self, *payload: Tensor) -> Payload:
        """The layers' own output; they take a payload as one argument."""
        with self._training.autocast(self._device):
            output: Payload = self.layers(payload[0] if len(payload) == 1 else payload)
        return output


class Strategy(ABC):
    """One rank of a baseline.

    Every rank is given the same micro-batches and uses what it needs of them. The gradients are those of the mean loss
    over all micro-batches, as plain PyTorch computes them (law 11).
    """

    def __init__(self, plan: Plan, stages: Sequence[int], training: Training, device: torch.device) -> None:
        """Take over some stages of a plan (their layers move to `device`).

        Args:
            plan: The plan.
            stages: The stages that this rank trains.
            training: How.
            device: Where.

        Raises:
            UsageError: The optimizer does not fit.
        """
        self.parts = {k: Part(plan.stage_module(k).to(device).train(), training, device) for k in stages}
        self.training, self.device = training, device
        self.optimizers: list[Optimizer] = []
        for k, part in self.parts.items():
            built = build_optimizers(training.optimizer, part.layers, None, owns_head=k == plan.stages - 1)
            self.optimizers += built
        self._schedules = build_schedules(training.schedule, self.optimizers, training.steps)

    @abstractmethod
    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Add the gradient of the mean loss over the micro-batches to `.grad` of this rank's parameters.

        Returns:
            The losses of the micro-batches that this rank has judged (0-dim), in order; none on most ranks.

        Raises:
            UsageError: The strategy cannot run with so many, or such, micro-batches.
        """

    def step(self, batches: Sequence[Batch]) -> list[Tensor]:
        """One optimizer step on the micro-batches; returns what `gradients` does."""
        losses = self.gradients(batches)
        if self.training.clip_norm is not None:
            self._clip(self.training.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in self._schedules:
            schedule.step()
        return losses

    def _clip(self, limit: float) -> None:
        """Scale the gradients down if the norm over the whole network is above the limit."""
        parameters = [p for part in self.parts.values() for p in part.parameters() if p.grad is not None]
        own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self._sum_over_ranks(own**2) ** 0.5
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a 0-dim tensor over the ranks that hold different parameters."""
        return value
