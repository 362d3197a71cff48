"""A network whose compute is sleep: many ranks share few cores and still overlap as real devices would."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import WIDTH, Durations, Unevenness, Workload
from decoupled_pp.core.plans import Plan
from decoupled_pp.training.partition import partition

CLASSES = 10


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        if forward:
            time.sleep(forward)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return gradients[0], None, None


def _sleep(tensor: Tensor, forward: float, backward: float) -> Tensor:
    slept: Tensor = _Sleep.apply(tensor, forward, backward)  # type: ignore[no-untyped-call]
    return slept


class EmulatedLayer(nn.Module):
    """(B, D) -> (B, D): one scale parameter per feature, and sleeps in place of compute.

    Half of the backward pass is the input's gradient and half the weight's, so that zero-bubble schedules can put them
    apart. A layer whose input needs no gradient (a decoupled stage, or the first) sleeps for both all the same, as a
    stage of several layers would for all but its first.
    """

    def __init__(
        self, width: int, forward_seconds: float, backward_seconds: float, durations: Durations | None = None
    ) -> None:
        """Creates a layer that sleeps for the given seconds, times its factor in `durations`."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._forward_seconds = forward_seconds
        self._half_backward_seconds = backward_seconds / 2
        self._durations = durations if durations is not None else Durations(Unevenness(), 0)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scales the features and sleeps; the backward pass of what this returns sleeps too."""
        forward_factor, backward_factor = self._durations.next(self)
        forward = self._forward_seconds * forward_factor
        half = self._half_backward_seconds * backward_factor
        if hidden_BD.requires_grad:
            return _sleep(hidden_BD, 0.0, half) * _sleep(self.scale, forward, half)
        return hidden_BD * _sleep(self.scale, forward, 2 * half)


def emulated_plan(work: Workload, durations: Durations, stages: int, ranks: int) -> Plan:
    """Cuts an emulated network for `ranks` ranks; the stages of a rank share its compute equally."""
    torch.manual_seed(0)
    share = ranks / stages
    layers: list[nn.Module] = [
        EmulatedLayer(WIDTH, work.forward_seconds * share, work.backward_seconds * share, durations)
        for _ in range(stages)
    ]
    layers[-1] = nn.Sequential(layers[-1], nn.Linear(WIDTH, CLASSES))
    return partition(layers, stages, "uniform", micro_batch(work)[0], device="cpu")


def micro_batch(work: Workload) -> tuple[Tensor, Tensor]:
    """Returns inputs (B, WIDTH) and class indices (B,), the same every time."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (work.batch,), generator=generator)
    return torch.randn(work.batch, WIDTH, generator=generator), targets
