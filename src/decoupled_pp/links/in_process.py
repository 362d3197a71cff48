"""A link between two stages of one process: a bounded first-in-first-out queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet, LinkCounters, LinkEnd, LinkTerms, Outlet
from decoupled_pp.core.device import Fence
from decoupled_pp.core.errors import LinkError, waited_too_long
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple, map_payload, payload_bytes
from decoupled_pp.core.structures import assemble, dismantle, is_plain


def _carried(tensor: Tensor) -> Tensor:
    """Return a copy as a wire would make it: no graph comes along, and the tensor is contiguous."""
    # Kernels sum in an order that depends on strides, so with others the two kinds of links would train differently.
    if is_plain(tensor):
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    form, tensors = dismantle(tensor.detach())
    copies = [part.clone(memory_format=torch.contiguous_format) for part in tensors]
    carried: Tensor = copies[0] if form is None else assemble(form, copies)
    return carried


class InProcessLink(Inlet, Outlet, LinkEnd):
    """Both ends of a link. `send` copies the tensors, as a wire would, so neither side can alter the other's."""

    def __init__(self, sender: int, terms: LinkTerms, device: torch.device) -> None:
        self._sender = sender
        self._names = (f"stage {sender}", f"stage {sender + 1}")
        self._capacity = terms.capacity
        self._timeout = terms.timeout_seconds
        self._returns = terms.returns
        self._device = device
        self._packets: deque[tuple[Packet, Fence]] = deque()
        self._taken: deque[Fence] = deque()  # of packets that the host has taken, and the device perhaps not yet
        self._returned: dict[int, tuple[list[Tensor], Fence]] = {}
        self._changed = threading.Condition()  # for stages that run in threads of their own
        self._closed = False
        self._last: int | None = None
        self._counters = LinkCounters()

    @property
    def sender(self) -> int:
        """Index of the sending stage."""
        return self._sender

    @property
    def counters(self) -> LinkCounters:
        """The count of what has crossed."""
        return self._counters

    def send(self, packet: Packet) -> None:
        """Queue a copy of the packet."""
        # One thread issues the work of both stages on CUDA and runs ahead of the device. So a packet counts as taken
        # only once the device has come to it: else the copies of all packets issued ahead would pile up in memory.
        while len(self._taken) >= self._capacity:
            self._taken.popleft().synchronize()
        parts = (packet.payload, packet.target, packet.rider)
        payload, target, rider = (map_payload(_carried, part) for part in parts)
        copied = replace(packet, payload=payload, target=target, rider=rider)
        size = sum(payload_bytes(part) for part in parts)
        with self._changed:
            self._wait(lambda: len(self._packets) < self._capacity, 0, f"room to send packet {packet.number} to")
            self._packets.append((copied, Fence(self._device)))
            self._counters.packets += 1
            self._counters.payload_bytes_forward += size
            if packet.kind is PacketKind.TRAIN:
                self._counters.training_bytes_forward += size
            self._changed.notify_all()

    def receive(self) -> Packet:
        """Take the oldest packet."""
        with self._changed:
            self._wait(lambda: bool(self._packets), 1, f"a packet (last: {self._last}) from")
            packet, sent = self._packets.popleft()
            self._last = packet.number
            self._changed.notify_all()
        sent.wait(*as_tuple(packet.payload), *as_tuple(packet.target), *as_tuple(packet.rider))
        self._taken.append(Fence(self._device))
        return packet

    def give_back(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Leave copies for the sending stage, in the form that a wire would carry."""
        copies = [self._as_carried_back(tensor) for tensor in tensors]
        fence = Fence(self._device)  # recorded here, on the stream that makes the copies
        with self._changed:
            self._returned[number] = (copies, fence)
            self._counters.payload_bytes_backward += payload_bytes(tuple(copies))
            self._changed.notify_all()

    def returned(self, number: int, like: Sequence[Tensor] = ()) -> list[Tensor]:
        """Take the tensors that the receiving stage has left."""
        with self._changed:
            self._wait(lambda: number in self._returned, 0, f"what comes back for packet {number} from")
            tensors, made = self._returned.pop(number)
        made.wait(*(tensor for tensor in tensors if tensor.is_cuda))
        return tensors

    def _as_carried_back(self, tensor: Tensor) -> Tensor:
        if self._returns.per_sample:  # floats go by the host between ranks too, in fp32
            return tensor.detach().to("cpu", torch.float32, copy=True)
        return _carried(tensor)

    def depth(self) -> int:
        """Return the number of packets in the link."""
        return len(self._packets)

    def close(self) -> None:
        """Wake whoever waits at the other end, with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], side: int, what: str) -> None:
        """Wait under `_changed` until ready; `side` is 0 for the sending stage and 1 for the receiving one."""
        here = self._names[side]
        there = self._names[1 - side]
        start = time.monotonic()
        if not self._changed.wait_for(lambda: ready() or self._closed, self._timeout):
            raise waited_too_long(here, f"{what} {there}", time.monotonic() - start, self._timeout)
        if self._closed and not ready():
            raise LinkError(f"{here} waited for {what} {there}, which closed the link", code="link-closed")
