"""A link between two stages of one process: a bounded first-in-first-out queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet, LinkCounters, LinkEnd, Outlet
from decoupled_pp.core.device import Fence
from decoupled_pp.core.errors import LinkError
from decoupled_pp.core.packets import Packet, PacketKind, as_tuple, map_payload, payload_bytes


def _carried(tensor: Tensor) -> Tensor:
    """A copy as a wire would make it: no graph comes along, and the strides are the plain ones of the shape.

    Kernels sum in an order that depends on strides, so with others the two kinds of links would train differently.
    """
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class InProcessLink(Inlet, Outlet, LinkEnd):
    """Both ends of a link. `send` copies the tensors, as a wire would, so neither side can alter the other's."""

    def __init__(self, sender: int, *, capacity: int, timeout_seconds: float, device: torch.device) -> None:
        """Make the link from stage `sender` to the next.

        Args:
            sender: Index of the sending stage.
            capacity: Packets the link may hold.
            timeout_seconds: Longest wait for a packet or for room.
            device: Device of both stages.
        """
        self._sender = sender
        self._names = (f"stage {sender}", f"stage {sender + 1}")
        self._capacity, self._timeout, self._device = capacity, timeout_seconds, device
        self._packets: deque[tuple[Packet, Fence]] = deque()
        self._taken: deque[Fence] = deque()
        self._losses: dict[int, Tensor] = {}
        self._gradients: dict[int, tuple[list[Tensor], Fence]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._last: int | None = None
        self._counters = LinkCounters()

    @property
    def sender(self) -> int:
        """Index of the sending stage."""
        return self._sender

    @property
    def counters(self) -> LinkCounters:
        """What has crossed."""
        return self._counters

    def send(self, packet: Packet) -> None:
        """Queue a copy of the packet.

        A thread that issues both stages' work on CUDA runs ahead of the device; so a packet counts as taken once the
        device of the receiving stage has come to it, or the copies of all packets issued ahead would pile up.
        """
        while len(self._taken) >= self._capacity:
            self._taken.popleft().synchronize()
        copied = Packet(
            packet.kind,
            packet.number,
            map_payload(_carried, packet.payload),
            map_payload(_carried, packet.target),
            map_payload(_carried, packet.rider),
        )
        with self._changed:
            self._wait(lambda: len(self._packets) < self._capacity, 0, f"room to send packet {packet.number} to")
            self._packets.append((copied, Fence(self._device)))
            self._counters.packets += 1
            size = sum(payload_bytes(part) for part in (packet.payload, packet.target, packet.rider))
            self._counters.payload_bytes_forward += size
            self._counters.training_bytes_forward += size if packet.kind is PacketKind.TRAIN else 0
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

    def give_back(self, number: int, losses: Tensor) -> None:
        """Leave a copy for the sending stage."""
        copied = losses.detach().to("cpu", torch.float32, copy=True)
        with self._changed:
            self._losses[number] = copied
            self._counters.payload_bytes_backward += copied.nbytes
            self._changed.notify_all()

    def losses_of(self, number: int) -> Tensor:
        """Take what the receiving stage has left."""
        with self._changed:
            self._wait(lambda: number in self._losses, 0, f"the losses of packet {number} from")
            return self._losses.pop(number)

    def give_gradient(self, number: int, gradient: Sequence[Tensor]) -> None:
        """Leave copies for the sending stage."""
        copies, fence = [_carried(tensor) for tensor in gradient], Fence(self._device)
        with self._changed:
            self._gradients[number] = (copies, fence)
            self._counters.payload_bytes_backward += payload_bytes(tuple(copies))
            self._changed.notify_all()

    def gradient_of(self, number: int, sent: Sequence[Tensor]) -> list[Tensor]:
        """Take what the receiving stage has left."""
        with self._changed:
            self._wait(lambda: number in self._gradients, 0, f"the gradient of packet {number} from")
            gradient, made = self._gradients.pop(number)
        made.wait(*gradient)
        return gradient

    def depth(self) -> int:
        """Packets in the link."""
        return len(self._packets)

    def close(self) -> None:
        """Wake whoever waits at the other end, with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], side: int, what: str) -> None:
        here, there = self._names[side], self._names[1 - side]
        start = time.monotonic()
        if not self._changed.wait_for(lambda: ready() or self._closed, self._timeout):
            waited = time.monotonic() - start
            raise LinkError(
                f"{here} waited {waited:.1f} s for {what} {there}: the bound of {self._timeout:g} s is over"
            )
        if self._closed and not ready():
            raise LinkError(f"{here} waited for {what} {there}, which closed the link")
