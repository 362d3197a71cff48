"""Sends the packets of a stage to the rank of the next one: takes credits, and listens for those that come back."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from decoupled_pp.core.channels import LinkCounters, LinkTerms, Outlet
from decoupled_pp.core.device import Fence
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.links import header as headers
from decoupled_pp.links import returns
from decoupled_pp.links.header import Parcel
from decoupled_pp.links.process_group import GroupEnd
from decoupled_pp.links.wire import Wire

_ROOMY_PACKETS = 8  # in a row before messages shrink: resizing empties the link, so one small batch is not worth it


class SendingEnd(GroupEnd, Outlet):
    """The upstream end of a link between two ranks."""

    def __init__(self, wire: Wire, terms: LinkTerms) -> None:
        super().__init__(wire, terms)
        self._outbox: queue.SimpleQueue[tuple[Parcel, Fence] | None] = queue.SimpleQueue()
        self._credits = terms.capacity
        self._taken = 0
        self._packets = 0
        self._training_bytes = 0
        self._roomy = 0  # packets in a row that filled less than half of their message
        self._returned: dict[int, list[Tensor]] = {}
        self._returns = terms.returns
        # Training packets whose floats may come back, number and samples, oldest first; others were never owed.
        self._owed: deque[tuple[int, int]] = deque()
        self._expected: queue.SimpleQueue[tuple[int, Sequence[Tensor]] | None] = queue.SimpleQueue()
        self._start(self._credit_loop)
        if self._returns.late:
            self._start(self._expect_loop)
        if wire.payload is not None:
            self._start(self._send_loop)

    def send(self, packet: Packet) -> None:
        """Take a credit and send the packet (between GPUs: hand it to the sender thread)."""
        parcel = headers.parcel(packet)  # before the credit: a packet that cannot travel must not cost one
        with self._changed:
            what = f"room to send packet {packet.number} (it has taken {self._taken} so far) to"
            self._wait(lambda: self._credits > 0, what)
            self._credits -= 1
            if self._returns.per_sample and packet.kind is PacketKind.TRAIN:
                self._owed.append((packet.number, packet.samples))
        self._packets += 1
        if packet.kind is PacketKind.TRAIN:
            self._training_bytes += parcel.payload_bytes
        self._ended = packet.kind is PacketKind.END
        if self._wire.payload is not None:
            self._make_room(packet, parcel.header_bytes)
            self._outbox.put((parcel, Fence(self._wire.device)))
            return
        self._make_room(packet, parcel.message_bytes)
        size = self._wire.out.size
        message = headers.pack(parcel, size)
        self._transport(lambda: self._wire.out.send(message, control_bytes=size - parcel.payload_bytes))

    def expect(self, number: int, like: Sequence[Tensor]) -> None:
        """Let a thread receive what comes back for a packet, so that its way back is hidden."""
        self._expected.put((number, like))

    def returned(self, number: int, like: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the tensors that the receiving stage gave back; those it waits for are received in this thread."""
        lane = self._wire.back
        if lane is None or self._returns.late:
            with self._changed:
                self._wait(lambda: number in self._returned, f"what comes back for packet {number} from")
                tensors = self._returned.pop(number)
            return [tensor.to(self._wire.device) for tensor in tensors] if self._returns.late else tensors
        # Not `empty_like`, which would keep strides: tensors travel contiguous.
        received = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        for tensor in received:
            self._transport(partial(lane.receive, tensor))
        return received

    @property
    def counters(self) -> LinkCounters:
        """The count of what this end has sent."""
        return LinkCounters(
            self._packets,
            self._wire.payload_bytes,
            control_bytes_forward=self._wire.out.control_bytes,
            training_bytes_forward=self._training_bytes,
        )

    def close(self) -> None:
        """End the threads; in order after an END packet, else by breaking the connection."""
        self._outbox.put(None)
        self._expected.put(None)
        self._finish()

    def _make_room(self, packet: Packet, needed: int) -> None:
        """Resize the posted receives if the packet does not fit, or if the last ones have left most of them empty."""
        out = self._wire.out
        is_roomy = 2 * needed < out.size and packet.samples > 0  # markers have no samples and are always small
        self._roomy = self._roomy + 1 if is_roomy else 0
        if needed <= out.size and self._roomy <= _ROOMY_PACKETS:
            return
        with self._changed:
            # This packet has taken its credit already. Once all others are back, the link is empty.
            while self._credits < self._capacity - 1:
                self._wait_for_credit(f"the link to be empty, to send packet {packet.number} of another size to")
        for _ in range(self._capacity):
            resize = headers.encode_resize(out.size, needed)
            self._transport(partial(out.send, resize, control_bytes=resize.numel()))
        out.size = needed
        self._roomy = 0

    def _wait_for_credit(self, what: str) -> None:
        """Wait under `_changed` until the peer has taken one packet more: the bound is for each packet, not for all."""
        taken = self._taken
        self._wait(lambda: self._taken > taken, what)

    def _send_loop(self) -> None:
        """Send packets between GPUs: the header once the tensors are computed, then the tensors."""
        lane = self._wire.payload
        assert lane is not None, "only a link between GPUs has this thread"
        in_flight: deque[tuple[Parcel, Fence]] = deque()  # tensors stay referenced until their send is over
        while (item := self._outbox.get()) is not None:
            parcel, computed = item
            # Announce it only now, because the receiver posts its receive at once: an NCCL kernel that waits for its
            # peer keeps multiprocessors from computing, and hangs the device if the peer dies before it sends.
            computed.synchronize()
            header = headers.announce(parcel, self._wire.out.size)
            self._wire.out.send(header, control_bytes=header.numel())
            for tensor in parcel.tensors:
                lane.send(tensor)
            in_flight.append((parcel, Fence(self._wire.device)))
            while len(in_flight) > self._capacity:
                in_flight.popleft()[1].synchronize()
        for _, sent in in_flight:
            sent.synchronize()

    def _expect_loop(self) -> None:
        """Receive what comes back late, packet by packet."""
        lane = self._wire.back
        assert lane is not None, "a rule whose returns are late gives back tensors per activation"
        while (item := self._expected.get()) is not None:
            number, like = item
            received = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in like]
            for tensor in received:
                lane.receive(tensor)
            with self._changed:
                self._returned[number] = received
                self._progress += 1
                self._changed.notify_all()

    def _credit_loop(self) -> None:
        """Listen to what comes back on the host: credits and losses, until the goodbye."""
        parts: list[Tensor] = []  # of floats that came in several messages
        while True:
            message = self._wire.into.receive()
            kind = returns.kind_of(message)
            if kind == returns.GOODBYE:
                return
            # Before it is counted: the packet that a credit lets out earns another one, which needs a posted receive.
            self._wire.into.post()
            with self._changed:
                if kind in {returns.FLOATS, returns.MORE_FLOATS}:
                    number, floats = returns.floats_in(message)
                    parts.append(floats)
                    self._refuse_not_owed(number, sum(map(len, parts)))
                    if kind == returns.FLOATS:
                        self._returned[number] = [torch.cat(parts)]
                        parts = []
                        self._owed.popleft()
                elif kind != returns.CREDIT or self._credits == self._capacity:
                    raise headers.not_of_a_packet(f"{kind:#x} is no credit that is due")
                else:
                    self._credits += 1
                    self._taken += 1
                self._progress += 1
                self._changed.notify_all()

    def _refuse_not_owed(self, number: int, floats: int) -> None:
        """Raise LinkError unless so many floats may come back for the packet; those before it get none any more."""
        while self._owed and self._owed[0][0] < number:
            self._owed.popleft()
        if not self._owed or self._owed[0][0] != number or floats > self._owed[0][1]:
            raise headers.not_of_a_packet(f"{floats} floats for packet {number} are not due")
