"""Carries tensors over a two-rank process group, one blocking call each: NCCL payload, and the greeting of two ends."""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor


class Lane:
    """Sends to, or receives from, the one peer of a two-rank group, and counts the bytes it sends."""

    def __init__(self, group: dist.ProcessGroup, peer: int, tag: int = 0) -> None:
        """Wrap `group`; `peer` is the other rank *within the group* (0 or 1). Tags tell a gloo group's lanes apart."""
        self._group = group
        self._peer = peer
        self._tag = tag
        self.bytes_sent = 0

    def send(self, tensor: Tensor) -> None:
        """Send one tensor. gloo: returns when the transport has taken it. NCCL: when it is on the current stream."""
        flat = as_bytes(tensor)
        if flat.numel():
            self.bytes_sent += flat.numel()
            self._group.send([flat], self._peer, self._tag).wait()

    def receive(self, tensor: Tensor) -> None:
        """Receive into a contiguous tensor; waits as `send` does."""
        flat = as_bytes(tensor)
        if flat.numel():
            self._group.recv([flat], self._peer, self._tag).wait()

    def break_off(self) -> None:
        """End NCCL kernels that wait for the peer, and with them whoever waits for the device."""
        with suppress(RuntimeError):
            self._group.abort()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat uint8 view (so that every dtype can travel every transport); a copy only if not contiguous."""
    if not tensor.numel():  # torch cannot view some empty tensors as another dtype
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8)
