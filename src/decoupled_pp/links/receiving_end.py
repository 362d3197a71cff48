"""Receives the packets of a stage from the rank of the one before, and sends a credit back for each one taken."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet, LinkCounters, LinkTerms
from decoupled_pp.core.device import Fence
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import header as headers
from decoupled_pp.links import returns
from decoupled_pp.links.process_group import GroupEnd
from decoupled_pp.links.wire import Lane, Wire


class _Return(NamedTuple):
    """Holds tensors that a thread sends back once the device has reached a fence."""

    fence: Fence
    send: Callable[[], None]
    held: Packet | None  # its memory may be reused after the fence, not before


class ReceivingEnd(GroupEnd, Inlet):
    """The downstream end of a link between two ranks."""

    def __init__(self, wire: Wire, terms: LinkTerms) -> None:
        super().__init__(wire, terms)
        self._arrivals: deque[tuple[Packet, Fence]] = deque()
        self._credit = returns.word(wire.out.size, returns.CREDIT)  # all are alike, and a message is only read
        self._goodbye = returns.word(wire.out.size, returns.GOODBYE)
        self._returns: queue.SimpleQueue[_Return | None] = queue.SimpleQueue()
        self._held: Packet | None = None
        self._last: int | None = None
        self._late = terms.returns.late
        self._start(self._receive_loop)
        if wire.payload is not None or self._late:
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
        # Between GPUs, the device gets to the fence of this credit once all work on the packet before is done: then
        # that packet's memory may be reused, and this packet has left the link.
        self._send_back(partial(self._send_credit, is_last=self._ended), self._held)
        if self._wire.payload is not None:
            self._held = packet
        return packet

    def give_back(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the stage that a packet came from: floats before its next credit, late ones in a thread."""
        lane = self._wire.back
        if lane is not None and self._late:
            self._returns.put(_Return(Fence(self._wire.device), partial(_send_from_host, lane, tensors), None))
            return
        if lane is not None:
            for tensor in tensors:
                self._transport(partial(lane.send, tensor))
            return
        (floats,) = tensors
        self._send_back(partial(self._send_floats, number, floats))

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
        self._returns.put(None)
        self._finish()

    def _send_back(self, send: Callable[[], None], held: Packet | None = None) -> None:
        """Send a message now; between GPUs, leave it to a thread that waits until the device has come to this point."""
        if self._wire.payload is None:
            self._transport(send)
        else:
            self._returns.put(_Return(Fence(self._wire.device), send, held))

    def _send_credit(self, *, is_last: bool) -> None:
        size = self._wire.out.size
        self._wire.out.send(self._credit, control_bytes=size)
        if is_last:
            self._wire.out.send(self._goodbye, control_bytes=size)

    def _send_floats(self, number: int, floats: Tensor) -> None:
        for message in returns.floats_messages(self._wire.out.size, number, floats.detach()):
            carried = returns.floats_in(message)[1].nbytes
            self._wire.out.send(message, control_bytes=message.numel() - carried)

    def _return_loop(self) -> None:
        """Send late tensors back, and between GPUs credits and losses, each once the device has come to its fence."""
        while (item := self._returns.get()) is not None:
            item.fence.synchronize()
            item.send()
            del item  # while this thread waits for the next one, it must not keep the packet's memory

    def _receive_loop(self) -> None:
        """Receive packets and resize messages until the END packet."""
        into = self._wire.into
        while True:
            message = into.receive()
            resized = headers.new_size(message)
            if resized is not None:
                into.size = resized  # the receives that are posted already are used up by the other RESIZE messages
                into.post()
                continue
            packet = self._packet_of(message)
            if packet.kind is not PacketKind.END:
                into.post()  # in place of the one that is used up, so that `capacity` receives stay posted
            with self._changed:
                # The fence is recorded on this thread's stream, after the receives that the packet needs.
                self._arrivals.append((packet, Fence(self._wire.device)))
                self._changed.notify_all()
            if packet.kind is PacketKind.END:
                return

    def _packet_of(self, message: Tensor) -> Packet:
        """Return the packet of a message; between GPUs, receive the tensors that it announces."""
        lane = self._wire.payload
        if lane is None:
            return headers.unpack(message)
        announced = headers.decode(message)
        tensors = [torch.empty(shape, dtype=dtype, device=self._wire.device) for shape, dtype in announced.specs]
        for tensor in tensors:
            lane.receive(tensor)
        return headers.packet_of(announced, tensors)


def _send_from_host(lane: Lane, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        lane.send(tensor.cpu())
