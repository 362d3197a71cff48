"""Defines the base of all baselines: one rank's part in an optimizer step of the whole network."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decoupled_pp.core.channels import LinkCounters
from decoupled_pp.core.device import on_device
from decoupled_pp.core.packets import Batch, Loss, Payload, as_tuple
from decoupled_pp.core.plans import Plan
from decoupled_pp.pipeline.activations import SavedActivations
from decoupled_pp.pipeline.groups import refuse_unmatched
from decoupled_pp.pipeline.losses import find_loss
from decoupled_pp.pipeline.optim import OptimizerFactory, build_optimizers, make_gradients_dense
from decoupled_pp.pipeline.recompute import checkpointed
from decoupled_pp.pipeline.schedules import ScheduleFactory, build_schedules
from decoupled_pp.settings.run import OptimizerSettings, ScheduleSettings, StageSettings


class Recorder(Protocol):
    """Takes the phases of a rank (`reports.PHASES`) as they end; `meter.StageMeter` is one."""

    def begin(self, packet: int) -> None:
        """Count the laps from here on for this micro-batch."""

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""


class _NoRecorder:
    def begin(self, packet: int) -> None: ...

    def lap(self, phase: str) -> None: ...


@dataclass(frozen=True)
class Training:
    """Says how a baseline trains, by the same sections that a decoupled run takes."""

    loss: Loss  # see `losses.find_loss`
    optimizer: OptimizerSettings | OptimizerFactory
    schedule: ScheduleSettings | ScheduleFactory
    steps: int  # optimizer steps that the schedule spans
    options: StageSettings = field(default_factory=StageSettings)  # precision, clipping, recomputation, compilation

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context that forward and loss run in."""
        if self.options.precision == "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


class Part(nn.Module):
    """A run of layers as torch's wrappers call it: a payload of several tensors comes as several arguments."""

    def __init__(self, layers: nn.Module, training: Training, device: torch.device) -> None:
        """Take over the layers, already on `device`."""
        super().__init__()
        self.layers = layers
        self._training = training
        self._device = device
        self._run: Callable[[Payload], Payload] = layers
        if training.options.checkpoint_activations:
            self._run = checkpointed(layers)
        if training.options.compile:
            self._run = cast(Any, torch.compile(self._run))

    def forward(self, *payload: Tensor) -> Payload:
        """Return the layers' own output; they take a payload as one argument."""
        with self._training.autocast(self._device):
            return self._run(payload[0] if len(payload) == 1 else payload)


class Strategy(ABC):
    """One rank of a baseline.

    Every rank is given the same micro-batches and uses what it needs of them. The gradients are those of the loss of
    all micro-batches as one batch, as plain PyTorch computes them (law 11); one in which nothing counts adds none.
    """

    def __init__(self, plan: Plan, stages: Sequence[int], training: Training, device: torch.device) -> None:
        """Take over some stages of a plan (their layers move to `device`)."""
        self.parts = {k: Part(plan.stage_module(k).to(device).train(), training, device) for k in stages}
        self.training = training
        self.criterion = find_loss(training.loss)
        self.device = device
        self.recorder: Recorder = _NoRecorder()
        self.first = 0  # number of the first micro-batch of the present step
        self.weights: list[float] = []  # how much each micro-batch of the step counts
        # Bytes that this rank has sent, by (rank that sends activations, rank that receives them).
        self.links: dict[tuple[int, int], LinkCounters] = {}
        # Most bytes that autograd held at any moment of the first step, all micro-batches in flight together.
        self.saved_activation_bytes_peak: int | None = None
        self.optimizers: list[Optimizer] = []
        refuse_unmatched(training.optimizer, plan.module)
        for k, part in self.parts.items():
            built = build_optimizers(training.optimizer, part.layers, None, owns_head=k == plan.stages - 1)
            self.optimizers += built
        self._schedules = build_schedules(training.schedule, self.optimizers, training.steps)

    @abstractmethod
    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Weigh the micro-batches; add the gradient of their loss to `.grad` of this rank's parameters.

        Return the losses of the micro-batches that this rank has judged (0-dim), in order; none on most ranks.
        """

    def owner(self, stage: int) -> int | None:
        """Return the rank that trains a stage; None if every rank does."""
        return None

    def share(self, count: int) -> range:
        """Return which of a step's `count` micro-batches this rank works on."""
        return range(count)

    def step(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Take one optimizer step on the micro-batches; return the losses that `gradients` returns."""
        is_first_step = self.saved_activation_bytes_peak is None
        with self._probe() if is_first_step else nullcontext():
            losses = self.gradients(batches)
        self.recorder.lap("wait_in")
        if any(self.weights):
            self._update()
        else:
            self._skip()
        self.recorder.lap("step")
        self.first += len(batches)
        return losses

    def _update(self) -> None:
        """Clip the gradients, take the optimizers' steps, and move the learning rates on."""
        make_gradients_dense(self.optimizers)
        if self.training.options.clip_norm is not None:
            self._clip(self.training.options.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in self._schedules:
            schedule.step()

    def _skip(self) -> None:
        """Move on without a step, because nothing counted in it."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():  # a schedule warns if its optimizer has not taken a step yet
            warnings.simplefilter("ignore", UserWarning)
            for schedule in self._schedules:
                schedule.step()

    def weigh(self, batches: Sequence[Batch]) -> None:
        """Find how much each micro-batch of the step counts; all ranks are given the same ones."""
        self.weights = [self.criterion.weight(batch) for batch in batches]

    def judged_part(self, output: Payload, target: Payload, number: int) -> tuple[Tensor, Tensor]:
        """Return the loss of micro-batch `number`, and what it adds to a mean over the step's micro-batches.

        That mean is the loss of all of them as one batch: sum_i w_i loss_i / sum_i w_i, or the sum of sums.
        """
        logits = as_tuple(output)[0]
        weight = self.weights[number]
        if not weight:  # its loss is 0 / 0, yet a pipeline waits for a gradient
            nothing = logits.sum() * 0.0
            return nothing, nothing
        with self.training.autocast(self.device):
            loss = self.criterion(logits, target)
        count = len(self.weights)
        factor = float(count) if self.criterion.sums else weight * count / sum(self.weights)
        return loss, loss if factor == 1.0 else loss * factor

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """Count the activations that a step saves for its backward passes."""
        kept = [tensor for part in self.parts.values() for tensor in (*part.parameters(), *part.buffers())]
        with SavedActivations(kept) as saved:
            yield
        self.saved_activation_bytes_peak = saved.peak

    def _sent(self, sender: int, receiver: int, tensor_bytes: int, *, backward: bool = False) -> None:
        """Count a message over the link on which activations go from rank `sender` to rank `receiver`."""
        counters = self.links.setdefault((sender, receiver), LinkCounters())
        if backward:
            counters.payload_bytes_backward += tensor_bytes
        else:
            counters.payload_bytes_forward += tensor_bytes
            counters.training_bytes_forward += tensor_bytes
            counters.packets += 1

    def _clip(self, limit: float) -> None:
        """Scale the gradients down if the norm over the whole network is above the limit."""
        parameters = [p for part in self.parts.values() for p in part.parameters() if p.grad is not None]
        own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self._sum_over_ranks(own**2) ** 0.5
        self.recorder.lap("wait_in")  # for the last rank to be done with the flush
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def _here(self, tensor: Tensor) -> Tensor:
        return on_device(tensor, self.device)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a 0-dim tensor over the ranks that hold different parameters."""
        return value
