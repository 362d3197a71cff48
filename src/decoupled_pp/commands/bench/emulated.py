"""Layers whose compute is a sleep: many ranks share few cores and still overlap as real devices would."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.commands.bench.durations import Durations, Unevenness


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


class EmulatedLayer(nn.Module):
    """(B, D) -> (B, D): one scale parameter per feature, and sleeps in place of compute.

    Half of the backward pass is the input's gradient and half the weight's, so that zero-bubble schedules can put them
    apart. A layer whose input needs no gradient (a decoupled stage, or the first) sleeps for both all the same, as a
    stage of several layers would for all but its first.
    """

    def __init__(
        self, width: int, forward_seconds: float, backward_seconds: float, durations: Durations | None = None
    ) -> None:
        """Make a layer that sleeps for the given times, `durations` times as long, in forward and backward."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._forward, self._half = forward_seconds, backward_seconds / 2
        self._durations = durations if durations is not None else Durations(Unevenness(), 0)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scale the features and sleep; the backward pass of what this returns sleeps too."""
        forward, backward = self._durations.next(self)
        both, half = not hidden_BD.requires_grad, self._half * backward
        inputs: Tensor = hidden_BD if both else _sleep(hidden_BD, 0.0, half)
        scale = _sleep(self.scale, self._forward * forward, 2 * half if both else half)
        return inputs * scale


def _sleep(tensor: Tensor, forward: float, backward: float) -> Tensor:
    slept: Tensor = _Sleep.apply(tensor, forward, backward)  # type: ignore[no-untyped-call]
    return slept
