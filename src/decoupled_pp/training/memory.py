"""Predicts the memory that every stage of a plan needs while it trains, and which stages fit their devices."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decoupled_pp.core import units
from decoupled_pp.core.copies import copy_of
from decoupled_pp.core.device import cuda_devices
from decoupled_pp.core.errors import UsageError, shown
from decoupled_pp.core.objective import CriticBuilder
from decoupled_pp.core.packets import Loss, Payload, as_tuple, map_payload, payload_bytes
from decoupled_pp.core.plans import Plan
from decoupled_pp.models.cutting import critic_context, stand_in_objective, trace
from decoupled_pp.models.cutting.layers import zeros_if_meta
from decoupled_pp.models.cutting.measure import critic_signature
from decoupled_pp.models.cutting.objective import CriticWithLoss, Objective
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.optim import OptimizerFactory, build_optimizers
from decoupled_pp.settings.run import OptimizerSettings


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a stage and its critic."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # tensors that autograd keeps between forward and backward of a micro-batch
    accumulates: bool = False  # true if gradients are there from one micro-batch to the next

    @property
    def peak(self) -> int:
        """The most bytes at one time, without those that operators need for a moment."""
        both = (self.activations, self.gradients)
        if self.accumulates:
            return self.weights + self.optimizer + sum(both)
        # Activations are freed while gradients are made, and gradients are freed before the next forward pass.
        return self.weights + self.optimizer + max(both)


def predict_memory(
    plan: Plan,
    critic: CriticBuilder | None,
    *,
    loss: Loss,
    optimizer: OptimizerSettings | OptimizerFactory,
    accumulate: int = 1,
) -> tuple[StageMemory, ...]:
    """Return the memory of every stage of a decoupled run; a network on the meta device needs none for this.

    The plan's sample is the micro-batch, targets are made up, and the optimizer's state is that of a step along zeros.
    """
    hiddens, output = trace(plan.module, plan.sample)
    found = []
    for stage in range(plan.stages):
        last = stage == plan.stages - 1
        judge: nn.Module | None = None
        if not last and critic is not None:
            context = critic_context(
                plan.module,
                hiddens,
                output,
                loss,
                boundary=plan.boundaries[stage + 1],
                stage=stage,
                stages=plan.stages,
            )
            objective = stand_in_objective(loss, context.output)
            judge = CriticWithLoss(critic(context), context, objective)
        else:
            objective = stand_in_objective(loss, output)
        given = hiddens[plan.boundaries[stage]]
        one = _measure(plan.stage_module(stage), given, optimizer, judge, objective if last else None)
        found.append(replace(one, accumulates=accumulate > 1))
    return tuple(found)


def _measure(
    module: nn.Module,
    given: Payload,
    optimizer: OptimizerSettings | OptimizerFactory,
    judge: nn.Module | None = None,
    objective: Objective | None = None,
) -> StageMemory:
    """Return the memory of layers, by one forward pass with their local loss and a few steps of the optimizer."""
    trunk = copy_of(module).train()
    is_meta = any(parameter.is_meta for parameter in trunk.parameters())
    place = torch.device("meta") if is_meta else as_tuple(given)[0].device
    whole = nn.ModuleList([trunk] if judge is None else [trunk, judge]).to(place)
    owned: list[Tensor] = [*whole.parameters(), *whole.buffers()]
    trainable = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    # The prediction must not move the caller's random numbers, from which dropout and weights come.
    with torch.enable_grad(), torch.random.fork_rng(devices=cuda_devices(place)), SavedActivations(owned) as saved:
        hidden = trunk(map_payload(lambda tensor: tensor.detach().to(place), given))
        made = judge(hidden) if judge is not None else hidden
        kept = objective(as_tuple(made)[0]) if objective is not None else made
        activations = saved.peak
        del hidden, made, kept
    _, state = optimizer_cost(whole, optimizer)
    return StageMemory(payload_bytes(tuple(owned)), payload_bytes(tuple(trainable)), state, activations)


class Room:
    """Says which stages fit the memory of their devices, by an upper bound of `predict_memory` made layer by layer.

    A tensor that two neighbouring layers both keep is counted twice, so a stage that fits here does fit.
    """

    def __init__(
        self,
        module: nn.Sequential,
        sample: Payload,
        critic: CriticBuilder | None,
        *,
        limits: Sequence[int],
        loss: Loss,
        optimizer: OptimizerSettings | OptimizerFactory,
        accumulate: int = 1,
    ) -> None:
        """Measure every layer; critics are measured when they are asked for."""
        self._module = module
        self._critic = critic
        self._optimizer = optimizer
        self._limits = list(limits)
        self._loss = loss
        self._accumulates = accumulate > 1
        hiddens, output = trace(module, sample)
        self._hiddens = [map_payload(zeros_if_meta, hidden) for hidden in hiddens]
        self._output = zeros_if_meta(output)
        self._objective = stand_in_objective(loss, self._output)
        objectives: list[Objective | None] = [None] * (len(module) - 1)
        self._layers = [
            _measure(layer, hidden, optimizer, None, objective)
            for layer, hidden, objective in zip(module, self._hiddens, [*objectives, self._objective], strict=True)
        ]
        self._critics: dict[tuple[int, int], StageMemory] = {}
        self._alike: dict[object, StageMemory] = {}

    def __call__(self, stage: int, first: int, end: int) -> bool:
        """Return whether layers first..end-1 and the critic behind them fit as this stage."""
        parts = list(self._layers[first:end])
        if self._critic is not None and end < len(self._layers):
            parts.append(self._critic_at(stage, end))
        together = StageMemory(
            sum(part.weights for part in parts),
            sum(part.gradients for part in parts),
            sum(part.optimizer for part in parts),
            sum(part.activations for part in parts),
            self._accumulates,
        )
        return together.peak <= self._limits[stage]

    def _critic_at(self, stage: int, boundary: int) -> StageMemory:
        if (stage, boundary) not in self._critics:
            assert self._critic is not None
            context = critic_context(
                self._module,
                self._hiddens,
                self._output,
                self._loss,
                boundary=boundary,
                stage=stage,
                stages=len(self._limits),
            )
            critic = self._critic(context)
            look = (boundary, critic_signature(critic))  # critics that look alike at one place need the same
            if look not in self._alike:
                judge = CriticWithLoss(critic, context, self._objective)
                self._alike[look] = _measure(judge, context.hidden, self._optimizer)
            self._critics[stage, boundary] = self._alike[look]
        return self._critics[stage, boundary]


_STEPS = 5
"""Measured steps, after a first one, which makes the optimizer's state."""


def optimizer_cost(module: nn.Module, choice: OptimizerSettings | OptimizerFactory) -> tuple[float, int]:
    """Return the seconds of a step and the bytes of the state it leaves, by taking steps along gradients of zeros."""
    optimizers = build_optimizers(choice, nn.Sequential(module), None, owns_head=False)
    if not optimizers:
        return 0.0, 0
    seconds = []
    for _ in range(1 + _STEPS):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if next(module.parameters()).is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    kept = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = [value for state in kept for value in state.values()]
    tensors = tuple(value for value in values if isinstance(value, Tensor))
    return statistics.median(seconds[1:]), payload_bytes(tensors)


def limits_of(memory: str | int | Sequence[str | int], stages: int) -> list[int]:
    """Return the bytes that the device of every stage has, from "20GiB", a number of bytes, or a list of them."""
    listed: list[Any] = list(memory) if isinstance(memory, list | tuple) else [memory] * stages
    if len(listed) != stages:
        raise UsageError(
            f"`balance.memory` has {len(listed)} sizes for {stages} stages; give one for all, or one for each",
            code="one-memory-per-stage",
            key="balance.memory",
        )
    try:
        found = [units.size(one) if isinstance(one, str) else float(one) for one in listed]
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"`balance.memory`: {error}", code="unusable-value", key="balance.memory") from None
    if not all(0 < one < math.inf for one in found):
        raise UsageError(
            f"`balance.memory` {shown(memory)} must be above 0; give the memory of a device",
            code="unusable-value",
            key="balance.memory",
        )
    return [int(one) for one in found]


def refuse_overflow(predicted: Sequence[StageMemory], limits: Sequence[int]) -> None:
    """Raise UsageError if a stage needs more than its device has."""
    for stage, (one, limit) in enumerate(zip(predicted, limits, strict=True)):
        if one.peak > limit:
            raise UsageError(
                f"stage {stage} needs {one.peak / 2**30:.3g} GiB, and its device has {limit / 2**30:.3g} GiB "
                "(`balance.memory`); use more `stages`, a smaller micro-batch, or set `cut` to time",
                code="stage-exceeds-memory",
                key="balance.memory",
            )
