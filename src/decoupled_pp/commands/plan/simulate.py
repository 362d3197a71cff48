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
from typing import Any, NamedTuple, TypeAlias

from decoupled_pp.commands.plan.orders import Operation
from decoupled_pp.core.errors import UsageError


class Message(NamedTuple):
    """A message between two ranks."""

    kind: str  # "activation", "gradient" or "credit"
    stage: int  # that sends it
    micro_batch: int
    source: int  # rank
    target: int  # rank
    size: int  # bytes
    eager: bool = False  # it may leave before the receiver has posted its receive


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
    """Properties of every link between two ranks, in each direction."""

    latency: float = 0.0  # seconds from the end of the sending to the arrival
    bandwidth: float = math.inf  # bytes per second
    host: float = 0.0  # seconds that handing over one send or receive keeps a rank from computing

    def __post_init__(self) -> None:
        """Raises UsageError for times and bandwidths that no link has."""
        if not (0 <= self.latency < math.inf and 0 <= self.host < math.inf and self.bandwidth > 0):
            raise UsageError(
                f"a link has latency {self.latency} s, bandwidth {self.bandwidth} B/s and {self.host} s per message: "
                "give finite times of at least 0 and a bandwidth above 0",
                code="option-out-of-range",
            )


@dataclass(frozen=True)
class Timeline:
    """Result of a simulation."""

    spans: list[list[Span]]  # operations of every rank, in order
    ends: list[float]  # when every rank's program ended, in seconds
    bytes_sent: dict[tuple[int, int, str], int]  # (source, target, kind of message) -> bytes


@dataclass
class _Transfer:
    """State of a message: when its sides called `Post` and `Send`, when its ends were reached, which rank waits."""

    posted: float = math.inf
    handed: float = math.inf
    ends: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


class _Simulation:
    """State of one simulation; `_agenda` is a heap of (time, number, action, its arguments before the time)."""

    def __init__(self, programs: Sequence[Program], seconds: Callable[[Operation], float], link: Link) -> None:
        self._programs = programs
        self._seconds = seconds
        self._link = link
        self._position = [0] * len(programs)
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._transfers: defaultdict[Message, _Transfer] = defaultdict(_Transfer)
        self._free: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._spans: list[list[Span]] = [[] for _ in programs]
        self._ends = [math.inf] * len(programs)
        self._bytes_sent: defaultdict[tuple[int, int, str], int] = defaultdict(int)

    def run(self) -> Timeline:
        """Runs until nothing is left to happen."""
        for rank in range(len(self._programs)):
            self._at(0.0, self._advance, rank)
        while self._agenda:
            now, _, action, arguments = heapq.heappop(self._agenda)
            action(*arguments, now)
        stuck = [rank for rank, end in enumerate(self._ends) if math.isinf(end)]
        if stuck:
            waits = self._programs[stuck[0]][self._position[stuck[0]]]
            # Not a UsageError: our programs cannot wait for ever, whatever the user asks for.
            raise ValueError(f"the programs never end: rank {stuck[0]} waits at {waits}; correct their order")
        return Timeline(self._spans, self._ends, dict(self._bytes_sent))

    def _at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        self._number += 1  # orders events of one time, so that a simulation gives the same result every time
        heapq.heappush(self._agenda, (time, self._number, action, arguments))

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
                self._spans[rank].append(Span(instruction.operation, now, end))
                self._at(end, self._advance, rank)
                return
            if isinstance(instruction, Send | Post):
                if self._link.host:
                    self._at(now + self._link.host, self._go_on, rank, instruction)
                    return
                self._hand_over(instruction, now)
        self._ends[rank] = now

    def _go_on(self, rank: int, instruction: Send | Post, now: float) -> None:
        self._hand_over(instruction, now)
        self._advance(rank, now)

    def _hand_over(self, instruction: Send | Post, now: float) -> None:
        """Notes one side of a message; the data start once both are there and word of the receive is at the sender."""
        message = instruction.message
        transfer = self._transfers[message]
        if isinstance(instruction, Send):
            transfer.handed = now
        else:
            transfer.posted = now
        word = now if message.eager else transfer.posted + self._link.latency
        ready = max(transfer.handed, word)
        if math.isfinite(ready):
            self._at(ready, self._depart, message)

    def _depart(self, message: Message, now: float) -> None:
        direction = message.source, message.target
        sent = max(now, self._free[direction]) + message.size / self._link.bandwidth
        self._free[direction] = sent
        self._bytes_sent[(*direction, message.kind)] += message.size
        self._at(sent, self._arrive, message, "sent")
        self._at(sent + self._link.latency, self._arrive, message, "received")

    def _arrive(self, message: Message, end: str, now: float) -> None:
        transfer = self._transfers[message]
        transfer.ends[end] = now
        rank = transfer.waiting.pop(end, None)
        if rank is not None:
            self._advance(rank, now)


def simulate(programs: Sequence[Program], seconds: Callable[[Operation], float], link: Link) -> Timeline:
    """Runs the programs of all ranks, in which an operation takes as long as `seconds` returns."""
    return _Simulation(programs, seconds, link).run()
