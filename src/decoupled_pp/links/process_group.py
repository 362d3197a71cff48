"""A link between two ranks: credits bound it, receives posted ahead hide its latency.

        sending rank                                              receiving rank
        ------------                                              --------------
        stage --send()---------------- message ---------------> receiver thread --> [arrivals] --receive()--> stage
                 ^                                                                                |
                 | one credit each                                                                | taken
              credits <--- listener thread <-------------- credit --------------------------------+

A packet needs a credit before it is sent, and its credit comes back once the receiving stage has taken it (on CUDA:
once the device has reached it). So wire + arrivals never hold more than `capacity` packets, a slow consumer slows its
producer, and no send is ever posted that its peer has no room for. The receiver keeps `capacity` receives posted: with
enough capacity throughput does not depend on the round trip.

Between CPUs a packet is one message: header, activations, target, rider. The first packet sets the size of posted
receives; a larger one, once the link is empty, sends one RESIZE message for each of them. Smaller ones are padded;
several in a row that fill less than half resize too.

Between GPUs the message is the header alone, sent once the activations are computed, and tensors follow over a group
of their own (NCCL). What has to wait for the device there is done by two more threads, the sender and the returner.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from decoupled_pp.core.channels import Inlet, LinkCounters, LinkEnd, Outlet
from decoupled_pp.core.device import Fence, own_stream
from decoupled_pp.core.errors import LinkError, TrainingError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import header as headers
from decoupled_pp.links import returns
from decoupled_pp.links.header import Parcel
from decoupled_pp.links.lane import Lane
from decoupled_pp.links.wire import Wire

_ROOMY_PACKETS = 8


class _End(LinkEnd):
    """What both ends share: threads that end with the stream or with the first error."""

    def __init__(self, wire: Wire, capacity: int, timeout_seconds: float) -> None:
        self._wire, self._capacity, self._timeout = wire, capacity, timeout_seconds
        self._changed = threading.Condition()
        self._error: LinkError | None = None
        self._closing = False
        self._progress = 0  # changes whenever a thread has got something done, or ends
        self._threads: list[threading.Thread] = []

    @property
    def sender(self) -> int:
        """Index of the sending stage."""
        return self._wire.sender

    def _start(self, *loops: Callable[[], None]) -> None:
        for loop in loops:
            thread = threading.Thread(target=self._guard, args=(loop,), name=f"dpp-link-{loop.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            with own_stream(self._wire.device):
                loop()
        except Exception as error:
            self._fail(error)
        with self._changed:
            self._progress += 1
            self._changed.notify_all()

    def _transport(self, call: Callable[[], None]) -> None:
        """A call of the transport in the stage's own thread; its errors are the link's, a signal's are not."""
        try:
            call()
        except TrainingError:
            raise
        except RuntimeError as error:
            raise self._fail(error) from error

    def _fail(self, error: Exception) -> LinkError:
        """Keep the first error of this end, wake who waits, tell the run, and end NCCL kernels that wait."""
        with self._changed:
            first, self._error = self._error is None, self._error or self._explain(error)
            self._changed.notify_all()
        if first and not self._closing:
            self._wire.failed(self._error.text)
            if self._wire.payload is not None:
                self._wire.payload.break_off()
        return self._error

    def _explain(self, error: Exception) -> LinkError:
        if isinstance(error, LinkError):
            return error
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        gone = "Connection closed" in text or "Connection reset" in text or "Broken pipe" in text or "closure" in text
        cause = (
            "is gone: its end of the link closed without an END packet (killed?)"
            if gone
            else f"cannot be reached: {text}"
        )
        return LinkError(f"{self._wire.there} {cause}, seen by {self._wire.here}")

    def _wait(self, ready: Callable[[], bool], what: str, bounds: int = 1) -> None:
        """Wait under `_changed` until ready, an error, or `bounds` times the bound."""
        start, bound = time.monotonic(), bounds * self._timeout
        self._changed.wait_for(lambda: ready() or self._error is not None, bound)
        if self._error is not None:
            raise self._error
        if ready():
            return
        waited = time.monotonic() - start
        raise LinkError(
            f"{self._wire.here} waited {waited:.1f} s for {what} {self._wire.there}: the bound of {bound:g} s is over"
        )

    def _finish(self, ended: bool) -> None:
        """Join the threads if the stream ended in order and the peer goes on taking packets, else break it off."""
        self._closing = not ended  # a peer that dies with the last packets is still a fault of the run
        threads, self._threads = self._threads, []
        with self._changed:
            while ended and self._error is None and any(thread.is_alive() for thread in threads):
                if not self._advances(self._progress):
                    break
        for thread in threads:
            thread.join(1.0 if ended else 0.0)
        self._closing = True
        if any(thread.is_alive() for thread in threads):
            self._wire.break_off()
            for thread in threads:
                thread.join(1.0)

    def _advances(self, before: int) -> bool:
        """Wait under `_changed` until a thread gets something done; False if none does within the bound."""
        return self._changed.wait_for(lambda: self._progress != before or self._error is not None, self._timeout)


class SendingEnd(_End, Outlet):
    """The upstream end of a link between two ranks."""

    def __init__(self, wire: Wire, *, capacity: int, timeout_seconds: float) -> None:
        """Take over a connected wire.

        Args:
            wire: This end's transport.
            capacity: Packets the link may hold.
            timeout_seconds: Longest wait for room.
        """
        super().__init__(wire, capacity, timeout_seconds)
        self._outbox: queue.SimpleQueue[tuple[Parcel, Fence] | None] = queue.SimpleQueue()
        self._credits = capacity
        self._taken = 0
        self._packets = 0
        self._training_bytes = 0
        self._roomy = 0  # packets in a row that filled less than half of their message
        self._ended = False
        self._returned: dict[int, Tensor] = {}
        self._start(self._credit_loop, *([self._send_loop] if wire.payload is not None else []))

    def send(self, packet: Packet) -> None:
        """Take a credit and send the packet (between GPUs: hand it to the sender thread)."""
        parcel = headers.parcel(packet)
        with self._changed:
            what = f"room to send packet {packet.number} (it has taken {self._taken} so far) to"
            self._wait(lambda: self._credits > 0, what)
            self._credits -= 1
        self._packets += 1
        self._training_bytes += parcel.payload_bytes if packet.kind is PacketKind.TRAIN else 0
        self._ended = packet.kind is PacketKind.END
        if self._wire.payload is not None:
            self._outbox.put((parcel, Fence(self._wire.device)))
            return
        self._make_room(packet, parcel.message_bytes)
        size = self._wire.out.size
        message = headers.pack(parcel, size)
        self._transport(lambda: self._wire.out.send(message, control_bytes=size - parcel.payload_bytes))

    def returned(self, number: int, like: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return what the receiving stage gave back; tensors as large as activations are received in this thread."""
        if self._wire.back is not None:
            return self._receive_back(self._wire.back, like)
        with self._changed:
            self._wait(lambda: number in self._returned, f"what comes back for packet {number} from")
            return [self._returned.pop(number)]

    def _receive_back(self, lane: Lane, like: Sequence[Tensor]) -> list[Tensor]:
        """Receive in the stage's own thread, which has nothing else to do until the tensors are there."""
        received = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        for tensor in received:
            self._transport(lambda tensor=tensor: lane.receive(tensor))  # type: ignore[misc]
        return received

    @property
    def counters(self) -> LinkCounters:
        """What this end has sent."""
        control = self._wire.out.control_bytes
        return LinkCounters(
            self._packets,
            self._wire.payload_bytes,
            control_bytes_forward=control,
            training_bytes_forward=self._training_bytes,
        )

    def close(self) -> None:
        """End the threads; in order after an END packet, else by breaking the connection."""
        self._outbox.put(None)
        self._finish(self._ended)

    def _make_room(self, packet: Packet, needed: int) -> None:
        """Resize the posted receives if the packet does not fit, or if the last ones have left most of them empty."""
        out = self._wire.out
        self._roomy = self._roomy + 1 if 2 * needed < out.size and packet.samples else 0
        if needed <= out.size and self._roomy <= _ROOMY_PACKETS:
            return
        with self._changed:
            while self._credits < self._capacity - 1:  # this packet's own is taken; all others back: the link is empty
                self._wait_for_credit(f"the link to be empty, to send packet {packet.number} of another size to")
        for _ in range(self._capacity):
            resize = headers.encode_resize(out.size, needed)
            self._transport(lambda message=resize: out.send(message, control_bytes=message.numel()))  # type: ignore[misc]
        out.size, self._roomy = needed, 0

    def _wait_for_credit(self, what: str) -> None:
        """Wait under `_changed` until the peer has taken one packet more: the bound is for each packet, not for all."""
        taken = self._taken
        self._wait(lambda: self._taken > taken, what)

    def _send_loop(self) -> None:
        lane = self._wire.payload
        in_flight: deque[tuple[Parcel, Fence]] = deque()  # tensors stay referenced until their send is over
        while lane is not None and (item := self._outbox.get()) is not None:
            parcel, computed = item
            # Announced only now, for the receiver posts its receive at once: an NCCL kernel that waits for its peer
            # keeps multiprocessors from computing, and hangs the device if the peer dies before it sends.
            computed.synchronize()
            header = headers.announce(parcel)
            self._wire.out.send(header, control_bytes=header.numel())
            for tensor in parcel.tensors:
                lane.send(tensor)
            in_flight.append((parcel, Fence(self._wire.device)))
            while len(in_flight) > self._capacity:
                in_flight.popleft()[1].synchronize()
        for _, sent in in_flight:
            sent.synchronize()

    def _credit_loop(self) -> None:
        while (kind := returns.kind_of(message := self._wire.into.receive())) != returns.GOODBYE:
            self._wire.into.post()
            with self._changed:
                if kind == returns.FLOATS:
                    number, floats = returns.floats_in(message)
                    self._returned[number] = floats
                else:
                    self._credits += 1
                    self._taken += 1
                self._progress += 1
                self._changed.notify_all()


class ReceivingEnd(_End, Inlet):
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
        self._returns: queue.SimpleQueue[tuple[Fence, object, tuple[int, Tensor] | None] | None] = queue.SimpleQueue()
        self._held: Packet | None = None
        self._last: int | None = None
        self._ended = False
        self._start(self._receive_loop, *([self._return_loop] if wire.payload is not None else []))

    def receive(self) -> Packet:
        """Take the next packet. Its tensors never require grad."""
        with self._changed:
            # The first packet has passed every earlier stage, each of which may have compiled on it.
            bounds = self._wire.sender + 1 if self._last is None else 1
            self._wait(lambda: bool(self._arrivals), f"a packet (last: {self._last}) from", bounds)
            packet, arrived = self._arrivals.popleft()
        arrived.wait()
        self._last, self._ended = packet.number, packet.kind is PacketKind.END
        self._return_credit(packet)
        return packet

    def give_back(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the stage that a packet came from: large ones at once, floats before its next credit."""
        lane = self._wire.back
        if lane is not None:
            for tensor in tensors:
                self._transport(lambda tensor=tensor: lane.send(tensor))  # type: ignore[misc]
            return
        (floats,) = tensors
        if self._wire.payload is None:
            self._transport(lambda: self._send_floats(number, floats))
        else:
            self._returns.put((Fence(self._wire.device), floats, (number, floats)))

    def depth(self) -> int:
        """Packets that have arrived and wait."""
        return len(self._arrivals)

    @property
    def counters(self) -> LinkCounters:
        """What this end has sent: credits, and what a rule sends back."""
        control = self._wire.out.control_bytes
        return LinkCounters(payload_bytes_backward=self._wire.payload_bytes, control_bytes_backward=control)

    def close(self) -> None:
        """End the threads; in order after an END packet, else by breaking the connection."""
        if not self._ended:
            self._returns.put(None)
        self._finish(self._ended)

    def _return_credit(self, packet: Packet) -> None:
        if self._wire.payload is None:
            self._transport(self._send_credit)
            return
        # The device gets to this fence once all work on the packet before is done: then that packet's memory may be
        # reused, and this one has left the link.
        self._returns.put((Fence(self._wire.device), self._held, None))
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
        while (item := self._returns.get()) is not None:
            fence, _, floats = item
            fence.synchronize()
            if floats is not None:
                self._send_floats(*floats)
            else:
                self._wire.out.send(self._credit, control_bytes=self._wire.out.size)
            del item, floats
        if self._ended:
            self._say_goodbye()

    def _receive_loop(self) -> None:
        into = self._wire.into
        while True:
            message = into.receive()
            resized = headers.new_size(message)
            if resized is not None:
                into.size = resized
                into.post()
                continue
            packet = headers.unpack(message) if self._wire.payload is None else self._receive_tensors(message)
            if packet.kind is not PacketKind.END:
                into.post()
            with self._changed:
                self._arrivals.append((packet, Fence(self._wire.device)))
                self._changed.notify_all()
            if packet.kind is PacketKind.END:
                return

    def _receive_tensors(self, message: Tensor) -> Packet:
        kind, number, forms, specs = headers.decode(message)
        tensors = [torch.empty(shape, dtype=dtype, device=self._wire.device) for shape, dtype in specs]
        for tensor in tensors:
            if self._wire.payload is not None:
                self._wire.payload.receive(tensor)
        return headers.assemble(kind, number, forms, tensors)
