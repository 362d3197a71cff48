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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from decoupled_pp.commands.plan.orders import Operation, Order, pipeline_order, rank_of, stages_per_rank
from decoupled_pp.commands.plan.simulate import Compute, Instruction, Message, Post, Program, Send, Wait


@dataclass(frozen=True)
class PipelineShape:
    """A pipeline without its times.

    Attributes:
        kind: Name of the strategy.
        ranks: Number of ranks.
        sizes: Bytes of one micro-batch's activations after every stage but the last.
        gradient_sizes: Bytes of the gradients that come back for them.
    """

    kind: str
    ranks: int
    sizes: tuple[int, ...]
    gradient_sizes: tuple[int, ...]

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

    def sent_after(self, operation: Operation) -> Message | None:
        """Returns the message that leaves the rank when an operation is done, if there is one."""
        kind, stage, number = operation
        if kind not in "FBI":
            return None
        forward = kind == "F"
        target = stage + 1 if forward else stage - 1
        if not 0 <= target < self.stages or self.rank_of(stage) == self.rank_of(target):
            return None
        name = "activation" if forward else "gradient"
        size = self.sizes[stage] if forward else self.gradient_sizes[target]
        return Message(name, stage, number, self.rank_of(stage), self.rank_of(target), size)

    def needed_before(self, operation: Operation) -> Message | None:
        """Returns the message of another rank that an operation needs, if there is one."""
        kind, stage, number = operation
        if kind not in "FBI":
            return None
        source = stage - 1 if kind == "F" else stage + 1
        return self.sent_after(Operation(kind, source, number)) if 0 <= source < self.stages else None


def flushed(shape: PipelineShape, micro_batches: int, steps: int) -> list[Program]:
    """Returns the programs of `steps` optimizer steps of a pipeline with a flush; S ends a step on every rank.

    Micro-batches of later steps have higher numbers.

    Raises:
        UsageError: The strategy refuses so many micro-batches.
    """
    order = pipeline_order(shape.kind, shape.ranks, micro_batches)
    lower = {"gpipe": _gpipe, "1f1b": _fused, "deepspeed": _blocking}.get(shape.kind, _ahead)
    programs: list[list[Instruction]] = [[] for _ in range(shape.ranks)]
    for step in range(steps):
        renumbered = [[_later(operation, step * micro_batches) for operation in one] for one in order]
        for rank, program in enumerate(lower(shape, renumbered)):
            programs[rank] += [*program, Compute(Operation("S", rank, step))]
    return list(programs)


def _later(operation: Operation, by: int) -> Operation:
    return operation._replace(micro_batch=operation.micro_batch + by)


def _receive(message: Message | None) -> list[Instruction]:
    return [] if message is None else [Post(message), Wait(message, "received")]


def _gpipe(shape: PipelineShape, orders: Sequence[Order]) -> list[list[Instruction]]:
    """Builds GPipe's programs: a receive is posted when it is needed; sends are waited for at the end of a phase."""
    programs = []
    for order in orders:
        program: list[Instruction] = []
        sent: list[Message] = []
        for operation, following in pairwise([*order, None]):
            assert operation is not None
            program += [*_receive(shape.needed_before(operation)), Compute(operation)]
            if (message := shape.sent_after(operation)) is not None:
                program.append(Send(message))
                sent.append(message)
            if following is None or following.kind != operation.kind:
                program += [Wait(message, "sent") for message in sent]
                sent = []
        programs.append(program)
    return programs


def _fused(shape: PipelineShape, orders: Sequence[Order]) -> list[list[Instruction]]:
    """Builds 1F1B's programs: a send is held back and posted with the next receive, if that goes the other way.

    Between two passes of one kind (warm-up, cool-down) the send goes out at once, and is waited for after the next one.
    """
    programs = []
    for order in orders:
        program: list[Instruction] = []
        held: Message | None = None
        flying: Message | None = None
        for operation, following in pairwise([*order, None]):
            assert operation is not None
            needed = shape.needed_before(operation)
            if held is not None:
                program.append(Send(held))
            if needed is not None:
                program.append(Post(needed))
            if held is not None:
                program.append(Wait(held, "sent"))
            if needed is not None:
                program.append(Wait(needed, "received"))
            program.append(Compute(operation))
            if flying is not None:
                program.append(Wait(flying, "sent"))
            held = shape.sent_after(operation)
            flying = None
            if held is not None and (following is None or following.kind == operation.kind):
                program.append(Send(held))
                flying = held
                held = None
        if flying is not None:
            program.append(Wait(flying, "sent"))
        programs.append(program)
    return programs


def _blocking(shape: PipelineShape, orders: Sequence[Order]) -> list[list[Instruction]]:
    """Builds DeepSpeed's programs: stage s runs forward k at clock 2 k + s, backward k at clock 2 k + 2 p - 1 - s.

    Before a forward clock's compute it receives activations, then sends the gradient of the clock before; before a
    backward clock's it sends the activations of the clock before, then receives a gradient.
    """
    programs = []
    for stage, order in enumerate(orders):
        first = min(number for _, _, number in order)
        clocks = {_clock(operation, shape.stages, first): operation for operation in order}
        program: list[Instruction] = []
        for clock in range(max(clocks) + 2):
            now = clocks.get(clock)
            before = clocks.get(clock - 1)
            receive = [] if now is None else _receive(shape.needed_before(now))
            send = [] if before is None else _send(shape.sent_after(before))
            forward_clock = (clock - stage) % 2 == 0
            program += [*receive, *send] if forward_clock else [*send, *receive]
            if now is not None:
                program.append(Compute(now))
        programs.append(program)
    return programs


def _send(message: Message | None) -> list[Instruction]:
    return [] if message is None else [Send(message), Wait(message, "sent")]


def _clock(operation: Operation, stages: int, first: int) -> int:
    kind, stage, number = operation
    return 2 * (number - first) + (stage if kind == "F" else 2 * stages - 1 - stage)


def _ahead(shape: PipelineShape, orders: Sequence[Order]) -> list[list[Instruction]]:
    """Builds programs of two stages per rank, with receives where torch's `_add_send_recv` puts them.

    It goes over the ranks in turn, one operation each, as far as what they need has been computed; an operation that
    sends puts the receive into the other rank's list there and then.
    """
    programs: list[list[Instruction]] = [[] for _ in orders]
    left = [list(reversed(_with_turns(order))) for order in orders]
    posted: set[Message] = set()
    while any(left):
        moved = False
        for rank, operations in enumerate(left):
            if not operations or not _may_follow(shape, operations[-1], posted):
                continue
            operation = operations.pop()
            moved = True
            if operation is None:
                continue
            needed = shape.needed_before(operation)
            message = shape.sent_after(operation)
            if needed is not None:
                programs[rank].append(Wait(needed, "received"))
            programs[rank].append(Compute(operation))
            if message is not None:
                programs[rank].append(Send(message))
                programs[message.target].append(Post(message))
                posted.add(message)
        assert moved, "an order that cannot run"
    for program in programs:
        program += [Wait(one.message, "sent") for one in reversed(program) if isinstance(one, Send)]
    return programs


def _with_turns(order: Order) -> list[Operation | None]:
    """Adds the turns (None) that torch's lowering spends after a stage's last pass, for REDUCE_GRAD and RESHARD."""
    last = {operation.stage: position for position, operation in enumerate(order)}
    turns: list[Operation | None] = []
    for position, operation in enumerate(order):
        turns.append(operation)
        if last[operation.stage] == position:
            turns += [None, None]
    return turns


def _may_follow(shape: PipelineShape, operation: Operation | None, posted: set[Message]) -> bool:
    """Returns whether torch's lowering may place an operation now: what it needs of another rank has been sent."""
    needed = shape.needed_before(operation) if operation is not None else None
    return needed is None or needed in posted


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
