"""Receives the packets of a stage from the rank of the one before, and sends a credit back for each one taken."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet, LinkCounters
from decoupled_pp.core.device import Fence
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import header as headers
from decoupled_pp.links import returns
from decoupled_pp.links.process_group import GroupEnd
from decoupled_pp.links.wire import Wire


class _Return(NamedTuple):
    """A message that goes back between GPUs once the device has come to a fence.

    Attributes:
        fence: The point to wait for.
        held: Objects whose memory may be reused after the fence.
        losses: Number of a packet and its floats; None for a credit.
    """

    fence: Fence
    held: object
    losses: tuple[int, Tensor] | None = None


class ReceivingEnd(GroupEnd, Inlet):
    """The downstream end of a link between two ranks."""

    def __init__(self, wire: Wire, *, capacity: int, timeout_seconds: float) -> None:
        """Take over a connected wire.

        Args:
            wire: This end's transport.
            capacity: Packets the link may hold.
            timeout_seconds: Longest wait for a packet; for the first one, times the stages before this one.
        """
        super().__init__(wire, capacity, timeout_seconds)
        self._arrivals: deque[tuple[Packet, Fence]] = deque()
        self._credit = returns.word(wire.out.size, returns.CREDIT)
        self._returns: queue.SimpleQueue[_Return | None] = queue.SimpleQueue()
        self._held: Packet | None = None
        self._last: int | None = None
        self._ended = False
        self._start(self._receive_loop)
        if wire.payload is not None:
            self._start(self._return_loop)

    def receive(self) -> Packet:
        """Take the next packet. Its tensors never require grad."""
        with self._changed:
            # The first packet has passed every earlier stage, each of which may have compiled on it.
            bounds = self._wire.sender + 1 if self._last is None else 1
            self._wait(lambda: bool(self._arrivals), f"a packet (last: {self._last}) from", bounds)
            packet, arrived = self._arrivals.popleft()
        arrived.wait()
        self._last = packet.number
        self._ended = packet.kind is PacketKind.END
        self._return_credit(packet)
        return packet

    def give_back(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the stage that a packet came from: large ones at once, floats before its next credit."""
        lane = self._wire.back
        if lane is not None:
            for tensor in tensors:
                self._transport(partial(lane.send, tensor))
            return
        (floats,) = tensors
        if self._wire.payload is None:
            self._transport(lambda: self._send_floats(number, floats))
        else:
            self._returns.put(_Return(Fence(self._wire.device), floats, (number, floats)))

    def depth(self) -> int:
        """Return the number of packets that have arrived and wait."""
        return len(self._arrivals)

    @property
    def counters(self) -> LinkCounters:
        """The count of what this end has sent: credits, and what a rule sends back."""
        return LinkCounters(
            payload_bytes_backward=self._wire.payload_bytes, control_bytes_backward=self._wire.out.control_bytes
        )

    def close(self) -> None:
        """End the threads; in order after an END packet, else by breaking the connection."""
        if not self._ended:
            self._returns.put(None)
        self._finish(self._ended)

    def _return_credit(self, packet: Packet) -> None:
        """Give the credit of a packet back; between GPUs, once the device has come to the packet."""
        if self._wire.payload is None:
            self._transport(self._send_credit)
            return
        # The device gets to this fence once all work on the packet before is done: then that packet's memory may be
        # reused, and this one has left the link.
        self._returns.put(_Return(Fence(self._wire.device), self._held))
        self._held = packet
        if self._ended:
            self._returns.put(None)

    def _send_credit(self) -> None:
        self._wire.out.send(self._credit, control_bytes=self._wire.out.size)
        if self._ended:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        size = self._wire.out.size
        self._wire.out.send(returns.word(size, returns.GOODBYE), control_bytes=size)

    def _send_floats(self, number: int, floats: Tensor) -> None:
        message = returns.floats_message(self._wire.out.size, number, floats.detach())
        self._wire.out.send(message, control_bytes=message.numel() - 4 * floats.numel())

    def _return_loop(self) -> None:
        """Send credits and losses back between GPUs, each once the device has come to its fence."""
        while (item := self._returns.get()) is not None:
            item.fence.synchronize()
            if item.losses is not None:
                self._send_floats(*item.losses)
            else:
                self._wire.out.send(self._credit, control_bytes=self._wire.out.size)
            del item  # while this thread waits for the next one, it must not keep the packet's memory
        if self._ended:
            self._say_goodbye()

    def _receive_loop(self) -> None:
        """Receive packets and resize messages until the END packet."""
        into = self._wire.into
        while True:
            message = into.receive()
            resized = headers.new_size(message)
            if resized is not None:
                into.size = resized
                into.post()
                continue
            packet = self._packet_of(message)
            if packet.kind is not PacketKind.END:
                into.post()  # in place of the one that is used up, so that `capacity` receives stay posted
            with self._changed:
                self._arrivals.append((packet, Fence(self._wire.device)))
                self._changed.notify_all()
            if packet.kind is PacketKind.END:
                return

    def _packet_of(self, message: Tensor) -> Packet:
        """Return the packet of a message; between GPUs, receive the tensors that it announces."""
        lane = self._wire.payload
        if lane is None:
            return headers.unpack(message)
        kind, number, forms, specs = headers.decode(message)
        tensors = [torch.empty(shape, dtype=dtype, device=self._wire.device) for shape, dtype in specs]
        for tensor in tensors:
            lane.receive(tensor)
        return headers.assemble(kind, number, forms, tensors)
