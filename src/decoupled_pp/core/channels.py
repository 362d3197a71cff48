"""What joins stages: the two ends of a link, what they count, and the control plane of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoupled_pp.core.errors import Fault
from decoupled_pp.core.packets import Packet
from decoupled_pp.core.reports import Record


class Inlet(ABC):
    """Where a stage's packets come from: the data feed, or the receiving end of a link."""

    @abstractmethod
    def receive(self) -> Packet:
        """Return the next packet; wait for it no longer than the configured bound.

        Raises:
            LinkError: The bound expired or the peer is gone.
        """

    def depth(self) -> int:
        """Packets that are here and not yet taken."""
        return 0

    def give_back(self, number: int, losses: Tensor) -> None:
        """Send the losses of a packet's samples, (B,), to the stage that it came from (cascade targets)."""
        raise AssertionError("there is no stage before this one")

    def give_gradient(self, number: int, gradient: Sequence[Tensor]) -> None:
        """Send the gradients for a packet's activations to the stage that they came from (end-to-end steps)."""
        raise AssertionError("there is no stage before this one")

    def close(self) -> None:  # noqa: B027 - nothing to release unless a subclass holds something
        """Release what the inlet holds; safe to call twice and after a failure."""


class Outlet(ABC):
    """Where a stage's packets go: the sending end of a link, or nowhere after the last stage."""

    @abstractmethod
    def send(self, packet: Packet) -> None:
        """Hand a packet over; wait for room no longer than the configured bound. The tensors must not change after.

        Raises:
            LinkError: The bound expired or the peer is gone.
        """

    def losses_of(self, number: int) -> Tensor:
        """What the next stage has given back of a packet, (B,) on the CPU; wait for it no longer than the bound.

        Raises:
            LinkError: The bound expired or the peer is gone.
        """
        raise AssertionError("there is no stage after this one")

    def gradient_of(self, number: int, sent: Sequence[Tensor]) -> list[Tensor]:
        """The gradients for the floating tensors of a packet that was sent; wait for them no longer than the bound.

        Raises:
            LinkError: The bound expired or the peer is gone.
        """
        raise AssertionError("there is no stage after this one")

    def close(self) -> None:  # noqa: B027 - nothing to release unless a subclass holds something
        """Release what the outlet holds; safe to call twice and after a failure."""


@dataclass
class LinkCounters:
    """What crossed one end of a link, in packets and bytes, counted where the transport is called.

    `training_bytes_forward` is the part of `payload_bytes_forward` that training packets carried.
    """

    packets: int = 0
    payload_bytes_forward: int = 0
    payload_bytes_backward: int = 0
    control_bytes_forward: int = 0
    control_bytes_backward: int = 0
    training_bytes_forward: int = 0


class LinkEnd(ABC):
    """Something that counts what crosses a link: one end of it, or (in one process) all of it."""

    @property
    @abstractmethod
    def sender(self) -> int:
        """Index of the sending stage."""

    @property
    @abstractmethod
    def counters(self) -> LinkCounters:
        """What has crossed."""


class Control(ABC):
    """The host-side control plane of a run: small JSON records, never tensors of the training."""

    @abstractmethod
    def post(self, record: Record) -> None:
        """Hand a record to whoever keeps the run's log (rank 0)."""

    @abstractmethod
    def collect(self) -> list[Record]:
        """All records posted since the last call, in order per stage. Only rank 0 calls this."""

    @abstractmethod
    def report_fault(self, text: str, *, usage: bool = False) -> bool:
        """Tell every rank why this one stops; the first report of a run wins. Returns whether it was this one."""

    @abstractmethod
    def fault(self) -> Fault | None:
        """The first reported fault, or None."""

    @abstractmethod
    def request_stop(self, reason: str) -> None:
        """Ask rank 0 to end the run in order (save, then END)."""

    @abstractmethod
    def stop_requested(self) -> str | None:
        """The reason of a requested stop, or None."""

    @abstractmethod
    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Give every process the JSON-able `value` of every process, in order of ranks (so this is a barrier too).

        Raises:
            LinkError: A rank did not give it within the bound.
            PeerError: A rank reported a fault meanwhile.
        """
