"""Baselines with the whole network on every rank: `backprop` (one process) and `data_parallel` (torch's DDP)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from decoupled_pp.baselines.strategy import Part, Strategy, Training
from decoupled_pp.contracts import Batch, Payload, Plan, UsageError, as_tuple, map_payload
from decoupled_pp.device import on_device


class _Chain(nn.Module):
    """All parts, one after the other."""

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
        return [self._backward(batch, len(batches)) for batch in batches]

    def _backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradient of this micro-batch's share of the mean of `count`."""
        inputs, target = (map_payload(lambda tensor: on_device(tensor, self.device), payload) for payload in batch)
        output = self._network(*as_tuple(inputs))
        with self.training.autocast(self.device):
            loss = self.training.loss(as_tuple(output)[0], target)
        (loss / count).backward()
        return loss.detach()


class DataParallel(Backprop):
    """`data_parallel`: every rank trains a copy of the network on its share of the micro-batches."""

    def __init__(self, plan: Plan, training: Training, device: torch.device, *, rank: int, ranks: int) -> None:
        """Take over the whole network as one of `ranks` copies, in the default process group."""
        super().__init__(plan, training, device)
        ids = [device.index] if device.type == "cuda" else None
        self._copy = DistributedDataParallel(self._network, device_ids=ids)
        self._network = self._copy
        self._rank, self._ranks = rank, ranks

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See `Strategy`; gradients are averaged over ranks in the last micro-batch's backward pass."""
        if len(batches) % self._ranks:
            raise UsageError(
                f"data_parallel: {len(batches)} micro-batches per step cannot be shared by {self._ranks} ranks evenly; "
                f"use a multiple of {self._ranks}"
            )
        mine, losses = batches[self._rank :: self._ranks], []
        for number, batch in enumerate(mine):
            with nullcontext() if number == len(mine) - 1 else self._copy.no_sync():
                losses.append(self._backward(batch, len(mine)))
        return losses
