"""Implements the baselines with the whole network on every rank: `backprop`, and `data_parallel` (torch's DDP)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.packets import Batch, Payload, as_tuple, map_payload
from decoupled_pp.core.plans import Plan
from decoupled_pp.training.baselines.strategy import Part, Strategy, Training


class _Chain(nn.Module):
    """Runs all parts, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *payload: Tensor) -> Payload:
        output: Payload = payload
        for part in self.parts:
            output = part(*as_tuple(output))
        return output


class Backprop(Strategy):
    """`backprop`: plain PyTorch in one process, one micro-batch after the other; the reference for all others."""

    def __init__(self, plan: Plan, training: Training, device: torch.device) -> None:
        """Take over the whole network; the arguments are those of `Strategy`."""
        super().__init__(plan, range(plan.stages), training, device)
        self._network: nn.Module = _Chain(list(self.parts.values()))

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See `Strategy`."""
        self.weigh(batches)
        return [self._backward(batch, number, len(batches)) for number, batch in enumerate(batches)]

    def _backward(self, batch: Batch, number: int, count: int) -> Tensor:
        """Add the gradient of micro-batch `number`'s share of the mean of `count`; return its loss."""
        self.recorder.begin(self.first + number)
        inputs, target = (map_payload(self._here, payload) for payload in batch)
        self.recorder.lap("wait_in")
        output = self._network(*as_tuple(inputs))
        self.recorder.lap("forward")
        loss, share = self.judged_part(output, target, number)
        self.recorder.lap("critic")
        (share / count).backward()
        self.recorder.lap("backward")
        return loss.detach()


class DataParallel(Backprop):
    """`data_parallel`: every rank trains a copy of the network on its share of the micro-batches."""

    def __init__(self, plan: Plan, training: Training, device: torch.device, *, rank: int, ranks: int) -> None:
        """Take over the whole network as one of `ranks` copies, in a group of all ranks (GPUs: NCCL)."""
        super().__init__(plan, training, device)
        cuda = device.type == "cuda"  # the default group is gloo's, which would take gradients over the host
        group = dist.new_group(backend="nccl") if cuda else None
        self._copy = DistributedDataParallel(
            self._network, device_ids=[device.index] if cuda else None, process_group=group
        )
        # DDP compares a hook's annotations with types, and ours are strings: the lambda has none.
        self._copy.register_comm_hook(group, lambda group, bucket: self._all_reduce(group, bucket))  # noqa: PLW0108
        self._network = self._copy
        self._rank = rank
        self._ranks = ranks

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See `Strategy`."""
        if len(batches) % self._ranks:
            raise UsageError(
                f"`strategy` data_parallel: {len(batches)} micro-batches per step cannot be shared by {self._ranks} "
                f"ranks evenly; set `training.accumulate` to a multiple of {self._ranks}",
                code="micro-batches-do-not-fit-strategy",
                key="training.accumulate",
            )
        self.weigh(batches)
        mine = self.share(len(batches))
        losses = []
        for number in mine:
            # DDP averages gradients in the last backward pass only: the others just add to them.
            with nullcontext() if number == mine[-1] else self._copy.no_sync():
                losses.append(self._backward(batches[number], number, len(mine)))
        return losses

    def share(self, count: int) -> range:
        """See `Strategy`."""
        return range(self._rank, count, self._ranks)

    def _all_reduce(self, group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> Any:
        """Average gradients as DDP does, and count the bytes."""
        # In a ring all-reduce every rank sends 2 (n - 1) / n of the buffer to its neighbour.
        size = 2 * (self._ranks - 1) * bucket.buffer().nbytes // self._ranks
        self._sent(self._rank, (self._rank + 1) % self._ranks, size, backward=True)
        return default_hooks.allreduce_hook(group, bucket)  # type: ignore[arg-type]
