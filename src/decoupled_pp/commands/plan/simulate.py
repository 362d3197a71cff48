"""A deterministic discrete-event simulation of ranks that compute, send and wait. No torch, no random numbers.

Every rank runs its program, a list of instructions, in order: `Compute` takes an operation's time, `Wait` as long as
it must, `Send` and `Post` what the host needs to hand a message to the library (`Link.host`).
A message crosses its link like this:

    sender    Send ----------+--- data start -- bytes / bandwidth --+ (Wait "sent" ends)
                             |                                      |
                             | latency                              | latency
    receiver  Post ----------+                                      +--> received (Wait "received" ends)

The data start once the sender has called `Send`, word of the receiver's `Post` has crossed the link (gloo and NCCL both
wait for it; a message with `eager` does not, because its sender holds a credit), and earlier messages of the same
direction of the same two ranks have left. Directions and pairs of ranks do not share bandwidth.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from decoupled_pp.commands.plan.orders import Operation
from decoupled_pp.core.errors import UsageError


class Message(NamedTuple):
    """A message between two ranks.

    Attributes:
        kind: "activation", "gradient" or "credit".
        stage: Index of the sending stage.
        micro_batch: Index of the micro-batch.
        source: Sending rank.
        target: Receiving rank.
        size: Bytes.
        eager: True if it may leave before the receiver has posted its receive.
    """

    kind: str
    stage: int
    micro_batch: int
    source: int
    target: int
    size: int
    eager: bool = False


class Compute(NamedTuple):
    """Makes the rank compute an operation."""

    operation: Operation


class Send(NamedTuple):
    """Makes the rank hand a message to the link and go on."""

    message: Message


class Post(NamedTuple):
    """Makes the rank say that it is ready to receive a message, and go on."""

    message: Message


class Wait(NamedTuple):
    """Makes the rank wait until a message is "sent" (its data have left) or "received"."""

    message: Message
    end: str


Instruction: TypeAlias = Compute | Send | Post | Wait
Program: TypeAlias = Sequence[Instruction]


class Span(NamedTuple):
    """One operation of a rank, in seconds since the start."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Link:
    """Properties of every link between two ranks, in each direction.

    Attributes:
        latency: Seconds from the end of the sending to the arrival.
        bandwidth: Bytes per second.
        host: Seconds that a rank is busy with handing over one send or one receive (its compute waits meanwhile).
    """

    latency: float = 0.0
    bandwidth: float = math.inf
    host: float = 0.0

    def __post_init__(self) -> None:
        """Raises UsageError for times and bandwidths that no link has."""
        if not (0 <= self.latency < math.inf and 0 <= self.host < math.inf and self.bandwidth > 0):
            raise UsageError(
                f"a link has latency {self.latency} s, bandwidth {self.bandwidth} B/s and {self.host} s per message: "
                "give finite times of at least 0 and a bandwidth above 0",
                code="option-out-of-range",
            )

    def seconds(self, size: int) -> float:
        """Returns the seconds that `size` bytes keep the link busy."""
        return size / self.bandwidth


@dataclass(frozen=True)
class Timeline:
    """Result of a simulation.

    Attributes:
        spans: Operations of every rank, in order.
        ends: When every rank's program ended, in seconds.
        bytes_sent: (source, target, kind of message) -> bytes.
    """

    spans: list[list[Span]]
    ends: list[float]
    bytes_sent: dict[tuple[int, int, str], int]

    def end_of_step(self, rank: int, step: int) -> float:
        """Returns when a rank ended its optimizer step number `step` (of a pipeline with a flush)."""
        return next(span.end for span in self.spans[rank] if span.operation[::2] == ("S", step))


@dataclass
class _Transfer:
    """State of a message.

    Attributes:
        posted: When the receiver called `Post`, in seconds; infinite until it has.
        handed: When the sender called `Send`, likewise.
        ends: "sent" and "received" -> when, once known.
        waiting: "sent" and "received" -> the rank that waits for it.
    """

    posted: float = math.inf
    handed: float = math.inf
    ends: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


class _Simulation:
    """State of one simulation; `_agenda` is a heap of (time, number, action)."""

    def __init__(self, programs: Sequence[Program], seconds: Callable[[Operation], float], link: Link) -> None:
        self._programs = programs
        self._seconds = seconds
        self._link = link
        self._position = [0] * len(programs)
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._transfers: defaultdict[Message, _Transfer] = defaultdict(_Transfer)
        self._free: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.spans: list[list[Span]] = [[] for _ in programs]
        self.ends = [math.inf] * len(programs)
        self.bytes_sent: defaultdict[tuple[int, int, str], int] = defaultdict(int)

    def run(self) -> Timeline:
        """Runs until nothing is left to happen.

        Raises:
            ValueError: Ranks wait for each other for ever.
        """
        for rank in range(len(self._programs)):
            self._at(0.0, lambda now, rank=rank: self._advance(rank, now))  # type: ignore[misc]
        while self._agenda:
            now, _, action = heapq.heappop(self._agenda)
            action(now)
        stuck = [rank for rank, end in enumerate(self.ends) if math.isinf(end)]
        if stuck:
            waits = self._programs[stuck[0]][self._position[stuck[0]]]
            # Not a UsageError: our programs cannot wait for ever, whatever the user asks for.
            raise ValueError(f"the programs never end: rank {stuck[0]} waits at {waits}; correct their order")
        return Timeline(self.spans, self.ends, dict(self.bytes_sent))

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        self._number += 1  # orders events of one time, so that a simulation gives the same result every time
        heapq.heappush(self._agenda, (time, self._number, action))

    def _advance(self, rank: int, now: float) -> None:
        """Runs a rank's program from here until it computes, waits or ends."""
        program = self._programs[rank]
        while self._position[rank] < len(program):
            instruction = program[self._position[rank]]
            if isinstance(instruction, Wait):
                transfer = self._transfers[instruction.message]
                if transfer.ends.get(instruction.end, math.inf) > now:
                    transfer.waiting[instruction.end] = rank
                    return
            self._position[rank] += 1
            if isinstance(instruction, Compute):
                end = now + self._seconds(instruction.operation)
                self.spans[rank].append(Span(instruction.operation, now, end))
                self._at(end, lambda then: self._advance(rank, then))
                return
            if isinstance(instruction, Send | Post):
                if self._link.host:
                    self._at(now + self._link.host, lambda then, it=instruction: self._go_on(rank, it, then))  # type: ignore[misc]
                    return
                self._hand_over(instruction, now)
        self.ends[rank] = now

    def _go_on(self, rank: int, instruction: Send | Post, now: float) -> None:
        self._hand_over(instruction, now)
        self._advance(rank, now)

    def _hand_over(self, instruction: Send | Post, now: float) -> None:
        transfer = self._transfers[instruction.message]
        if isinstance(instruction, Send):
            transfer.handed = now
        else:
            transfer.posted = now
        self._match(instruction.message, now)

    def _match(self, message: Message, now: float) -> None:
        """Starts the data once both sides are there and word of the receive is at the sender."""
        transfer = self._transfers[message]
        if math.isinf(transfer.handed) or (math.isinf(transfer.posted) and not message.eager):
            return
        ready = now if message.eager else max(transfer.handed, transfer.posted + self._link.latency)
        self._at(ready, lambda then: self._depart(message, then))

    def _depart(self, message: Message, now: float) -> None:
        direction = message.source, message.target
        sent = max(now, self._free[direction]) + self._link.seconds(message.size)
        self._free[direction] = sent
        self.bytes_sent[(*direction, message.kind)] += message.size
        for end, time in (("sent", sent), ("received", sent + self._link.latency)):
            self._at(time, lambda then, end=end: self._arrive(message, end, then))  # type: ignore[misc]

    def _arrive(self, message: Message, end: str, now: float) -> None:
        transfer = self._transfers[message]
        transfer.ends[end] = now
        rank = transfer.waiting.pop(end, None)
        if rank is not None:
            self._advance(rank, now)


def simulate(programs: Sequence[Program], seconds: Callable[[Operation], float], link: Link) -> Timeline:
    """Runs the programs of all ranks.

    Args:
        programs: One per rank.
        seconds: Returns how long an operation takes.
        link: Every link between two ranks.

    Raises:
        ValueError: The ranks wait for each other for ever.
    """
    return _Simulation(programs, seconds, link).run()
