"""Defines what joins stages: the two ends of a link, what they count, and the control plane of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoupled_pp.core.errors import Fault
from decoupled_pp.core.packets import Packet
from decoupled_pp.core.reports import Record


@dataclass(frozen=True)
class Returns:
    """Describes what a training rule sends back over a link for a training packet; nothing unless a rule says so."""

    # A float for every sample. They travel beside the credits, and the earlier stage takes them later: nobody waits.
    per_sample: bool = False
    # A tensor for every floating-point activation of the packet. The earlier stage waits for them.
    per_activation: bool = False
    # The tensors per activation come some packets later, and the earlier stage goes on meanwhile (`Outlet.expect`).
    late: bool = False

    def __bool__(self) -> bool:
        return self.per_sample or self.per_activation


@dataclass(frozen=True)
class LinkTerms:
    """The terms that the two ends of a link agree on."""

    capacity: int  # packets the link may hold
    timeout_seconds: float  # longest wait for a packet, for room, or for what comes back
    returns: Returns = Returns()
    samples: int = 0  # of the largest packet; sizes what comes back per sample


class Inlet(ABC):
    """The source of a stage's packets: the data feed, or the receiving end of a link."""

    @abstractmethod
    def receive(self) -> Packet:
        """Return the next packet; raises LinkError if the wait's bound expires or the peer is gone."""

    def depth(self) -> int:
        """Return the number of packets that are here and not yet taken."""
        return 0

    def give_back(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Send tensors back to the stage that training packet `number` came from; see `Returns`."""
        raise AssertionError("there is no stage before this one")

    def close(self) -> None:  # noqa: B027 - nothing to release unless a subclass holds something
        """Release what the inlet holds; safe to call twice and after a failure."""


class Outlet(ABC):
    """The destination of a stage's packets: the sending end of a link, or nowhere after the last stage."""

    @abstractmethod
    def send(self, packet: Packet) -> None:
        """Hand a packet over, whose tensors must not change after.

        Raises LinkError if the bound of the wait for room expires or the peer is gone.
        """

    def expect(self, number: int, like: Sequence[Tensor]) -> None:  # noqa: B027 - what is there when asked for needs no call
        """Begin to receive what the next stage will give back for training packet `number`, for `Returns.late`.

        The tensors are of the shapes and types of `like`; packets are named in the order in which they are given back.
        """

    def returned(self, number: int, like: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return what the next stage gave back for training packet `number`; raises LinkError as `send` does.

        For `Returns.per_sample` that is one tensor of shape (B,), fp32, on the CPU; for `Returns.per_activation`
        tensors of the shapes, types and device of `like`.
        """
        raise AssertionError("there is no stage after this one")

    def close(self) -> None:  # noqa: B027 - nothing to release unless a subclass holds something
        """Release what the outlet holds; safe to call twice and after a failure."""


class Nowhere(Outlet):
    """The outlet of the last stage."""

    def send(self, packet: Packet) -> None:
        """Drop the packet."""


@dataclass(frozen=True)
class Ends:
    """The two ends that one stage stands between."""

    inlet: Inlet
    outlet: Outlet


@dataclass
class LinkCounters:
    """Counts what crossed one end of a link, in packets and bytes, where the transport is called."""

    packets: int = 0
    payload_bytes_forward: int = 0
    payload_bytes_backward: int = 0
    control_bytes_forward: int = 0
    control_bytes_backward: int = 0
    training_bytes_forward: int = 0  # the part of `payload_bytes_forward` that training packets carried


class LinkEnd(ABC):
    """Counts what crosses a link: one end of it, or (in one process) all of it."""

    @property
    @abstractmethod
    def sender(self) -> int:
        """Index of the sending stage."""

    @property
    @abstractmethod
    def counters(self) -> LinkCounters:
        """The count of what has crossed."""


class Control(ABC):
    """The host-side control plane of a run: small records, never tensors of the training."""

    @abstractmethod
    def post(self, record: Record) -> None:
        """Hand a record to whoever keeps the run's log (rank 0)."""

    @abstractmethod
    def collect(self) -> list[Record]:
        """Return all records posted since the last call, in order per stage. Only rank 0 calls this."""

    @abstractmethod
    def report_fault(self, fault: Fault) -> bool:
        """Tell every rank why this one stops; the first report of a run wins. Return whether it was this one."""

    @abstractmethod
    def fault(self) -> Fault | None:
        """Return the first reported fault, or None."""

    @abstractmethod
    def request_stop(self, reason: str) -> None:
        """Ask rank 0 to end the run in order (save, then END)."""

    @abstractmethod
    def stop_requested(self) -> str | None:
        """Return the reason of a requested stop, or None."""

    @abstractmethod
    def gather(self, name: str, value: Any, timeout_seconds: float) -> list[Any]:
        """Give every process the `value` of every process, in order of ranks (so this is a barrier too).

        A value is JSON-able, records included. It arrives as parsed JSON on every process, also where there is one.
        Raises LinkError after the bound, and PeerError once a rank reports a fault.
        """

    @abstractmethod
    def from_rank_0(self, name: str, make: Callable[[], Any], timeout_seconds: float) -> Any:
        """Let rank 0 make a JSON-able value and give it to every rank.

        Raises LinkError after the bound, and PeerError if rank 0 could not make it (which raises its own error there).
        """
