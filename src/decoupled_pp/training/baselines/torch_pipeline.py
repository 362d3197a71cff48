"""Implements the baselines that are `torch.distributed.pipelining`'s own schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Payload, as_tuple, map_payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.training.baselines.strategy import Strategy, Training


@dataclass(frozen=True)
class ScheduleKind:
    """One of torch's schedules."""

    make: Any
    stages_per_rank: int = 1  # stages on every rank
    folded: bool = False  # true if the stages go up the ranks and down again (V), instead of starting over at rank 0
    splits_backward: bool = False  # true if a backward pass is done in two parts, first for inputs, later for weights

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """Return the stages that a rank trains."""
        stages = []
        for turn in range(self.stages_per_rank):
            runs_down = self.folded and turn % 2 == 1
            place = ranks - 1 - rank if runs_down else rank
            stages.append(turn * ranks + place)
        return stages


SCHEDULES = {
    "gpipe": ScheduleKind(schedules.ScheduleGPipe),
    "1f1b": ScheduleKind(schedules.Schedule1F1B),
    "interleaved_1f1b": ScheduleKind(schedules.ScheduleInterleaved1F1B, 2),
    "zero_bubble": ScheduleKind(schedules.ScheduleInterleavedZeroBubble, 2, splits_backward=True),
    "zbv": ScheduleKind(schedules.ScheduleZBVZeroBubble, 2, folded=True, splits_backward=True),
}
"""GPipe (Huang et al. 2019), 1F1B (PipeDream-flush, Narayanan et al. 2021), interleaved 1F1B (Megatron-LM, 2104.04473),
and zero-bubble schedules, interleaved and ZBV (Qi et al. 2024, 2401.10241)."""


class _RecordedStage(PipelineStage):
    """A stage of torch that records every forward and backward for its strategy, and counts what it sends."""

    def __init__(self, part: nn.Module, index: int, pipeline: TorchPipeline) -> None:
        super().__init__(_Contiguous(part), index, pipeline.plan.stages, pipeline.device, group=pipeline.group)
        self._pipeline = pipeline

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        return self._recorded("forward", fwd_chunk_id, super().forward_one_chunk, *arguments, **keywords)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        return self._recorded("backward", bwd_chunk_id, super().backward_one_chunk, *arguments, **keywords)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        return self._recorded("backward", bwd_chunk_id, super().backward_weight_one_chunk, *arguments, **keywords)

    def _compute_outputs(self, *arguments: Any, module: nn.Module, **keywords: Any) -> Any:
        """Let torch's trial run, which finds shapes before the first step, leave no trace."""
        # The trial computes on memory that nobody has written, so BatchNorm's running statistics would stay NaN. The
        # hooks hide the trial's saved tensors from the probe of activations: they belong to no step.
        if not self.is_first:
            for argument in arguments:
                argument.data.zero_()  # whatever lies there, as an index it would be out of range
        before = [(buffer, buffer.clone()) for buffer in module.buffers()]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            outputs = super()._compute_outputs(*arguments, module=module, **keywords)
        for buffer, value in before:
            buffer.data.copy_(value)  # .data: the trial's backward pass, which comes next, must not see a change
        return outputs

    def _compute_input_grads(self, *arguments: Any, **keywords: Any) -> Any:
        """Let torch's trial run announce gradients as they will be sent."""
        gradients = super()._compute_input_grads(*arguments, **keywords)
        return tuple(gradient if gradient is None else gradient.contiguous() for gradient in gradients)

    def _prepare_backward_infra(self, *arguments: Any, **keywords: Any) -> Any:
        """Keep the loss of the trial run from the recorder: it is no micro-batch's."""
        if keywords.get("loss_fn") is not None:
            keywords["loss_fn"] = self._pipeline.judge
        return super()._prepare_backward_infra(*arguments, **keywords)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id), backward=False)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id), backward=True)

    def _recorded(self, phase: str, chunk: int, call: Any, *arguments: Any, **keywords: Any) -> Any:
        recorder = self._pipeline.recorder
        recorder.begin(self._pipeline.first + chunk)
        recorder.lap("wait_in")
        result = call(chunk, *arguments, **keywords)
        recorder.lap(phase)
        return result

    def _counted(self, sends: list[dist.P2POp], *, backward: bool) -> list[dist.P2POp]:
        for op in sends:
            op.tensor = op.tensor.contiguous()  # the gradient of a mean is one number, expanded
        self._pipeline.count([(op.peer, op.tensor.nbytes) for op in sends], backward=backward)
        return sends


class _Contiguous(nn.Module):
    """Makes the output of a part fit to send: gloo and NCCL take contiguous memory only."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *payload: Tensor) -> Payload:
        return map_payload(Tensor.contiguous, self.part(*payload))


class TorchPipeline(Strategy):
    """Pipelined backpropagation with a flush per optimizer step."""

    def __init__(
        self,
        kind: str,
        plan: Plan,
        training: Training,
        device: torch.device,
        *,
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Take over this rank's stages; activations and gradients travel in a group of all ranks (GPUs: NCCL)."""
        self.kind = kind
        self._schedule_kind = SCHEDULES[kind]
        if training.options.compile and self._schedule_kind.splits_backward:
            raise UsageError(
                f"`strategy` {kind}: torch's split backward does not work with torch.compile; set `training.compile` "
                "to false",
                code="contradictory-settings",
                key="training.compile",
            )
        mine = self._schedule_kind.stages_of(rank, ranks)
        super().__init__(plan, mine, training, device)
        self.plan = plan
        self.group = group
        if device.type == "cuda" and group is None:
            self.group = dist.new_group(backend="nccl")
        self._rank = rank
        self._ranks = ranks
        self._stages = [_RecordedStage(part, k, self) for k, part in self.parts.items()]
        self._first = 0 in mine
        self._last = plan.stages - 1 in mine
        self._schedules_by_count: dict[int, Any] = {}
        self._targets: list[Payload] = []
        self._losses: dict[int, Tensor] = {}  # of the step, by micro-batch

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See `Strategy`; rank 0 uses the inputs, the rank of the last stage the targets and returns the losses."""
        self.weigh(batches)
        shapes = {tuple(tuple(tensor.shape) for tensor in as_tuple(inputs)) for inputs, _ in batches}
        if len(shapes) > 1:
            raise UsageError(
                f"`strategy` {self.kind}: micro-batches of one step must have one shape, not {sorted(shapes)}; leave "
                "smaller ones out",
                code="micro-batches-of-other-shapes",
                key="strategy",
            )
        schedule = self._schedule(len(batches))
        whole: list[Tensor] = []
        if self._first:
            inputs = [as_tuple(payload) for payload, _ in batches]
            whole = [self._here(torch.cat(tensors)) for tensors in zip(*inputs, strict=True)]
        numbers = None
        if self._last:
            self._targets = [map_payload(self._here, target) for _, target in batches]
            numbers = torch.arange(len(batches))
        self._losses.clear()
        schedule.step(*whole, target=numbers, return_outputs=False)
        return [self._losses[number] for number in sorted(self._losses)]

    def owner(self, stage: int) -> int | None:
        """See `Strategy`."""
        return next(r for r in range(self._ranks) if stage in self._schedule_kind.stages_of(r, self._ranks))

    def count(self, sent: Sequence[tuple[int, int]], *, backward: bool) -> None:
        """Count messages (peer rank, bytes) of one micro-batch; tensors of one payload are one packet."""
        sizes: Counter[int] = Counter()
        for peer, size in sent:
            sizes[peer] += size
        for peer, size in sizes.items():
            sender, receiver = (peer, self._rank) if backward else (self._rank, peer)
            self._sent(sender, receiver, size, backward=backward)

    def _schedule(self, count: int) -> Any:
        """Return the schedule for so many micro-batches per step."""
        if count not in self._schedules_by_count:
            make = self._schedule_kind.make
            has_one = self._schedule_kind.stages_per_rank == 1
            stages: Any = self._stages[0] if has_one else self._stages
            try:
                self._schedules_by_count[count] = make(stages, n_microbatches=count, loss_fn=self._loss)
            except (ValueError, AssertionError) as error:
                raise UsageError(
                    f"`strategy` {self.kind} cannot run with {count} micro-batches per step: {error}; set "
                    "`training.accumulate` to another number",
                    code="micro-batches-do-not-fit-strategy",
                    key="training.accumulate",
                ) from error
        return self._schedules_by_count[count]

    def judge(self, output: Payload, number: Tensor) -> Tensor:
        """Return the share of a micro-batch, given by number: torch can chunk a tensor, but no tuple of targets."""
        place = int(number)
        loss, share = self.judged_part(output, self._targets[place], place)
        self._losses[place] = loss.detach()
        return share

    def _loss(self, output: Payload, number: Tensor) -> Tensor:
        share = self.judge(output, number)
        self.recorder.lap("critic")
        return share

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.group)
        return value
