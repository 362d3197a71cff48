"""The loop of one rank: take a packet, do what it asks, pass it on.

    feed --> [stage 0] --link--> [stage 1] --link--> [stage 2]        time -->
    stage 0   F0 B0 F1 B1 F2 B2 F3 B3
    stage 1      F0 B0 F1 B1 F2 B2 F3 B3          F: forward, then the output leaves
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3       B: critic, backward, optimizer step

There is no flush and no bubble after the fill: a stage waits only for a packet, or for room in the link behind it.
Markers (evaluation, checkpoint, end) travel the same links in the same order, so every stage meets them after the same
training packet and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from decoupled_pp.core.channels import Inlet, Outlet
from decoupled_pp.core.device import own_stream
from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.core.reports import Record
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.stage import EndToEnd, Stage, floating

_WAITS = {
    PacketKind.TRAIN: "wait_in",
    PacketKind.EVALUATE: "evaluate",
    PacketKind.EVALUATION_END: "evaluate",
    PacketKind.SAVE: "save",
    PacketKind.END: "end",
}
"""What the wait for a packet is called: one for a pause is part of the pause, not of training."""


class Nowhere(Outlet):
    """The outlet of the last stage."""

    def send(self, packet: Packet) -> None:
        """Drop the packet."""


@dataclass
class Worker:
    """One stage joined to its two links.

    Attributes:
        stage: The stage.
        inlet: Where packets come from.
        outlet: Where they go.
        meter: Takes the measurements.
        save: Saves the stage; called with the number of training packets done.
        post: Takes records.
        stream: Context in which the stage's device work is issued.
    """

    stage: Stage
    inlet: Inlet
    outlet: Outlet
    meter: StageMeter
    save: Callable[[Stage, int], None]
    post: Callable[[Record], None]
    stream: AbstractContextManager[object] = field(init=False)
    _half: EndToEnd | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.stream = own_stream(self.stage.device)

    def advance(self) -> bool:
        """Take one packet and do what it asks; False once that was the END."""
        packet = self.inlet.receive()
        self.meter.begin(packet.number)
        self.meter.lap(_WAITS[packet.kind])
        with self._named(packet):
            self._do(packet)
        return packet.kind is not PacketKind.END

    @contextmanager
    def _named(self, packet: Packet) -> Iterator[None]:
        """An error in here says at which packet of which stage."""
        try:
            yield
        except (UsageError, TrainingError):  # these say it themselves
            raise
        except Exception as error:
            error.add_note(f"stage {self.stage.index}, {packet.kind.name} packet {packet.number}")
            raise

    def _do(self, packet: Packet) -> None:
        if packet.kind is PacketKind.TRAIN and self.stage.is_end_to_end(packet.number):
            self._half = self.stage.begin_end_to_end(packet, self.outlet.send, self.meter.lap)
        elif packet.kind is PacketKind.TRAIN:
            loss = self.stage.step(packet, self.outlet.send, self.meter.lap)
            self._cascade(packet.number)
            self._count(packet, loss)
        elif packet.kind is PacketKind.EVALUATE:
            self.stage.evaluate(packet, self.outlet.send)
            self.meter.lap("evaluate")
        else:
            self.outlet.send(packet)
            if packet.kind in {PacketKind.SAVE, PacketKind.END}:
                self._complete_lessons()
            self.meter.flush(self.stage, self.inlet.depth())  # finds a loss that is not finite before it is saved
            if packet.kind is PacketKind.EVALUATION_END:
                self._report_evaluation()
            elif packet.kind is PacketKind.SAVE:
                self.save(self.stage, packet.number)
                self.meter.lap("save")

    def complete(self) -> None:
        """The second half of an end-to-end step, once the next stage has done its own; else nothing."""
        if self._half is None:
            return
        half, self._half = self._half, None
        with self._named(half.packet):
            gradient = None
            if not isinstance(self.outlet, Nowhere):
                gradient = self.outlet.gradient_of(half.packet.number, floating(half.hidden))
                self.meter.lap("wait_out")
            loss = self.stage.finish_end_to_end(half, gradient, self.meter.lap)
            if self.stage.index:
                self.inlet.give_gradient(half.packet.number, half.gradient)
        self._count(half.packet, loss)

    def _count(self, packet: Packet, loss: Tensor | None) -> None:
        if self.meter.trained(packet.number, loss, packet.samples):
            self.meter.flush(self.stage, self.inlet.depth())

    def _cascade(self, number: int) -> None:
        """Give the packet's losses to the stage before; learn from those of the stage after, if any are due."""
        stage = self.stage
        if stage.losses is not None:
            self.inlet.give_back(number, stage.losses)
        lesson = stage.cascade.due(number) if stage.cascade is not None else None
        if lesson is not None:
            losses = self.outlet.losses_of(lesson.number) if lesson.losses is None else lesson.losses
            stage.learn_lesson(losses)
            self.meter.lap("critic")

    def _complete_lessons(self) -> None:
        """Before a checkpoint or the end: a link keeps no losses for later, so wait for those that are under way."""
        for lesson in self.stage.cascade.lessons if self.stage.cascade is not None else ():
            if lesson.losses is None:
                lesson.losses = self.outlet.losses_of(lesson.number)

    def close(self) -> None:
        """Release both links."""
        self.inlet.close()
        self.outlet.close()

    def _report_evaluation(self) -> None:
        score = self.stage.finish_evaluation()
        self.meter.lap("evaluate")
        self.meter.last_exit = score
        neighbours = self.stage.neighbours
        if neighbours is not None:
            self.meter.last_knn = neighbours.accuracy()
        if score is None:
            return
        loss, accuracy = score
        record = {"stage": self.stage.index, "step": self.stage.updates, "samples": self.stage.samples}
        times = {"seconds": self.meter.seconds(), "training_seconds": self.meter.training_seconds()}
        probe = {"knn_accuracy": self.meter.last_knn} if neighbours is not None else {}
        self.post({"kind": "validation", **record, "loss": loss, "accuracy": accuracy, **probe, **times})


def run(workers: Sequence[Worker]) -> None:
    """Run the stages of this process until the END packet has passed them all.

    One worker is one rank of a distributed run. Several are a pipeline in one process: every kind of packet passes
    every stage, so taking turns, first stage first, keeps at most one packet in each link. On CUDA each stage of a
    process has a stream of its own, so that their work overlaps although one thread issues it. End-to-end steps come
    back through the stages, last stage first.
    """
    running = True
    while running:
        for worker in workers:
            with worker.stream:
                running = worker.advance()
        for worker in reversed(workers):
            with worker.stream:
                worker.complete()
