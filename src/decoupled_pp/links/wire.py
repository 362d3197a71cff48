"""One end of the transport of a link between two ranks: messages on the host, and lanes for large tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.structures import as_bytes
from decoupled_pp.links.messages import MessageReceiver, MessageSender


class Lane:
    """Sends tensors to the one peer of a two-rank group, or receives them, one blocking call each."""

    def __init__(self, group: dist.ProcessGroup, peer: int, tag: int = 0, waits: Sequence[timedelta] = ()) -> None:
        self._group = group
        self._waits = waits  # the bound of every wait, if it is not the group's
        self._peer = peer  # the rank within the group, 0 or 1
        self._tag = tag  # tells a gloo group's lanes apart; NCCL knows no tags
        self.bytes_sent = 0

    def send(self, tensor: Tensor) -> None:
        """Send one tensor. gloo: returns when the transport has taken it. NCCL: when it is on the current stream."""
        flat = as_bytes(tensor)
        if flat.numel():
            self.bytes_sent += flat.numel()
            self._group.send([flat], self._peer, self._tag).wait(*self._waits)

    def receive(self, tensor: Tensor) -> None:
        """Receive into a contiguous tensor; waits as `send` does."""
        flat = as_bytes(tensor)
        if flat.numel():
            self._group.recv([flat], self._peer, self._tag).wait(*self._waits)

    def break_off(self) -> None:
        """End NCCL kernels that wait for the peer, and with them whoever waits for the device."""
        if self._waits:  # of helper threads, on the host: it ends with the messages
            return
        with suppress(RuntimeError):
            self._group.abort()


@dataclass(frozen=True)
class Wire:
    """One end of a link's transport."""

    sender: int  # index of the sending stage
    out: MessageSender  # of packets at the upstream end, of credits at the downstream end
    into: MessageReceiver  # the other way round
    payload: Lane | None  # tensors forward between GPUs; between CPUs they are in the messages
    device: torch.device
    here: str  # name of this end, such as "stage 0 (rank 0)"
    there: str
    failed: Callable[[LinkError], object]  # called once, by whichever thread finds the link broken
    back: Lane | None = None  # tensors as large as activations that come back, if a rule gives any back

    @property
    def payload_bytes(self) -> int:
        """The bytes of tensors that this end has sent."""
        return self.out.payload_bytes + sum(lane.bytes_sent for lane in self._lanes)

    def break_off(self) -> None:
        """Close the connection now, so that whoever waits at either end wakes."""
        self.out.break_off()
        # Between CPUs `back` is on the group of `out`, and aborting a gloo group leaves its waiting threads asleep.
        if self.payload is not None:
            for lane in self._lanes:
                lane.break_off()

    @property
    def _lanes(self) -> list[Lane]:
        return [lane for lane in (self.payload, self.back) if lane is not None]
