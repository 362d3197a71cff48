"""Turns an order of compute into programs: when a rank sends, when it is ready to receive, what it waits for.

Where it matters for time, this follows the libraries (torch 2.13 `schedules.py`, DeepSpeed
`pipe/schedule.py`):

- `gpipe` posts a receive only when it needs it and waits for it; its sends are waited for at the end of a phase.
- `1f1b` fuses the send of one direction with the receive of the other and waits for both (`_batch_p2p`).
- the schedules of two stages per rank post receives ahead, where torch's `_add_send_recv` puts them, and wait for
  sends at the end of the step only.
- `deepspeed` sends and receives one message at a time, each blocking.
- `decoupled` takes a credit before it sends, and its receives are always posted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from decoupled_pp.commands.plan.orders import Operation, Order, pipeline_order, rank_of, stages_per_rank
from decoupled_pp.commands.plan.simulate import Compute, Instruction, Message, Post, Program, Send, Wait


@dataclass(frozen=True)
class PipelineShape:
    """A pipeline without its times."""

    kind: str  # the strategy
    ranks: int
    sizes: tuple[int, ...]  # bytes of one micro-batch's activations after every stage but the last
    gradient_sizes: tuple[int, ...]  # bytes of the gradients that come back for them

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.ranks * stages_per_rank(self.kind)

    def rank_of(self, stage: int) -> int:
        """Returns the rank that holds a stage."""
        return rank_of(self.kind, stage, self.ranks)

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages that a rank holds."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def sent_after(self, operation: Operation) -> list[Message]:
        """Returns the message that leaves the rank when an operation is done, or none."""
        kind, stage, number = operation
        if kind not in "FBI":
            return []
        forward = kind == "F"
        target = stage + 1 if forward else stage - 1
        if not 0 <= target < self.stages or self.rank_of(stage) == self.rank_of(target):
            return []
        name = "activation" if forward else "gradient"
        size = self.sizes[stage] if forward else self.gradient_sizes[target]
        return [Message(name, stage, number, self.rank_of(stage), self.rank_of(target), size)]

    def needed_before(self, operation: Operation) -> list[Message]:
        """Returns the message of another rank that an operation needs, or none."""
        kind, stage, number = operation
        source = stage - 1 if kind == "F" else stage + 1
        return self.sent_after(Operation(kind, source, number)) if 0 <= source < self.stages else []


def flushed(shape: PipelineShape, micro_batches: int, steps: int) -> list[Program]:
    """Returns the programs of `steps` optimizer steps of a pipeline with a flush; S ends a step on every rank.

    Micro-batches of later steps have higher numbers.
    """
    orders = pipeline_order(shape.kind, shape.ranks, micro_batches)
    lower = {"gpipe": _gpipe, "1f1b": _fused, "deepspeed": _blocking}.get(shape.kind)
    programs: list[list[Instruction]] = [[] for _ in orders]
    for step in range(steps):
        first = step * micro_batches
        now = [[one._replace(micro_batch=first + one.micro_batch) for one in order] for order in orders]
        lowered = _ahead(shape, now) if lower is None else [lower(shape, order) for order in now]
        for rank, program in enumerate(lowered):
            programs[rank] += [*program, Compute(Operation("S", rank, step))]
    return list(programs)


def _sent(messages: Iterable[Message]) -> list[Instruction]:
    return [Wait(message, "sent") for message in messages]


def _received(messages: Iterable[Message]) -> list[Instruction]:
    return [Wait(message, "received") for message in messages]


def _gpipe(shape: PipelineShape, order: Order) -> list[Instruction]:
    """Builds GPipe's program: a receive is posted when it is needed; sends are waited for at the end of a phase."""
    program: list[Instruction] = []
    for _, phase in groupby(order, key=lambda operation: operation.kind):
        sent: list[Message] = []
        for operation in phase:
            needed = shape.needed_before(operation)
            leaving = shape.sent_after(operation)
            program += [*map(Post, needed), *_received(needed), Compute(operation), *map(Send, leaving)]
            sent += leaving
        program += _sent(sent)
    return program


def _fused(shape: PipelineShape, order: Order) -> list[Instruction]:
    """Builds 1F1B's program: a send is held back and posted with the next receive, if that goes the other way.

    Between two passes of one kind (warm-up, cool-down) the send goes out at once, and is waited for after the next one.
    """
    program: list[Instruction] = []
    held: list[Message] = []
    flying: list[Message] = []
    following_kinds = [*(operation.kind for operation in order[1:]), order[-1].kind]
    for operation, following_kind in zip(order, following_kinds, strict=True):
        needed = shape.needed_before(operation)
        program += [*map(Send, held), *map(Post, needed), *_sent(held), *_received(needed)]
        program += [Compute(operation), *_sent(flying)]
        held = shape.sent_after(operation)
        flying = []
        if following_kind == operation.kind:
            program += map(Send, held)
            flying = held
            held = []
    return program + _sent(flying)


def _blocking(shape: PipelineShape, order: Order) -> list[Instruction]:
    """Builds DeepSpeed's program: stage s runs forward k at clock 2 k + s, backward k at clock 2 k + 2 p - 1 - s.

    Before a forward clock's compute it receives activations, then sends the gradient of the clock before; before a
    backward clock's it sends the activations of the clock before, then receives a gradient.
    """
    stage = order[0].stage
    first = order[0].micro_batch
    starts = {"F": stage, "B": 2 * shape.stages - 1 - stage}
    clocks = {2 * (one.micro_batch - first) + starts[one.kind]: one for one in order}
    program: list[Instruction] = []
    for clock in range(max(clocks) + 2):
        needed = shape.needed_before(clocks[clock]) if clock in clocks else []
        leaving = shape.sent_after(clocks[clock - 1]) if clock - 1 in clocks else []
        receive = [*map(Post, needed), *_received(needed)]
        send = [*map(Send, leaving), *_sent(leaving)]
        # At one clock, neighbours differ in parity: one receives first where the other sends first, so none blocks.
        program += [*receive, *send] if (clock - stage) % 2 == 0 else [*send, *receive]
        if clock in clocks:
            program.append(Compute(clocks[clock]))
    return program


def _ahead(shape: PipelineShape, orders: Sequence[Order]) -> list[list[Instruction]]:
    """Builds programs of two stages per rank, with receives where torch's `_add_send_recv` puts them.

    It goes over the ranks in turn, one operation each, as far as what they need has been computed; an operation that
    sends puts the receive into the other rank's list there and then.
    """
    programs: list[list[Instruction]] = [[] for _ in orders]
    left = [_with_turns(order) for order in orders]
    posted: set[Message] = set()
    while any(left):
        moved = False
        for rank, operations in enumerate(left):
            if not operations:
                continue
            operation = operations[0]
            needed = [] if operation is None else shape.needed_before(operation)
            if not posted.issuperset(needed):
                continue
            operations.popleft()
            moved = True
            if operation is None:
                continue
            leaving = shape.sent_after(operation)
            programs[rank] += [*_received(needed), Compute(operation), *map(Send, leaving)]
            for message in leaving:
                programs[message.target].append(Post(message))
            posted.update(leaving)
        assert moved, "an order that cannot run"
    return [program + _sent(one.message for one in reversed(program) if isinstance(one, Send)) for program in programs]


def _with_turns(order: Order) -> deque[Operation | None]:
    """Adds the turns (None) that torch's lowering spends after a stage's last pass, for REDUCE_GRAD and RESHARD."""
    last = {operation.stage: position for position, operation in enumerate(order)}
    turns: deque[Operation | None] = deque()
    for position, operation in enumerate(order):
        turns.append(operation)
        if last[operation.stage] == position:
            turns += [None, None]
    return turns


def decoupled(shape: PipelineShape, capacity: int, packets: int, accumulate: int = 1) -> list[Program]:
    """Returns the programs of a decoupled run: F, then the packet leaves, C, B, and S every `accumulate` packets.

    A packet needs a credit. The credit of packet n comes back when the next stage takes it, and lets n + capacity go.
    """

    def packet(stage: int, number: int) -> Message:
        return Message("activation", stage, number, stage, stage + 1, shape.sizes[stage], eager=True)

    def credit(stage: int, number: int) -> Message:
        return Message("credit", stage, number, stage, stage - 1, 8, eager=True)

    def turn(stage: int, number: int) -> list[Instruction]:
        program: list[Instruction] = []
        if stage:
            program += [Wait(packet(stage - 1, number), "received"), Send(credit(stage, number))]
        program.append(Compute(Operation("F", stage, number)))
        if stage < shape.stages - 1:
            if number >= capacity:
                program.append(Wait(credit(stage + 1, number - capacity), "received"))
            program.append(Send(packet(stage, number)))
        program += [Compute(Operation(kind, stage, number)) for kind in "CB"]
        if (number + 1) % accumulate == 0:
            program.append(Compute(Operation("S", stage, number)))
        return program

    return [[step for number in range(packets) for step in turn(stage, number)] for stage in range(shape.stages)]
