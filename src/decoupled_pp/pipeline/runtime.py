"""Runs the loop of one rank: take a packet, do what it asks, pass it on.

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

from decoupled_pp.core.channels import Ends
from decoupled_pp.core.device import own_stream
from decoupled_pp.core.errors import ReportedError, UsageError
from decoupled_pp.core.packets import Packet, PacketKind
from decoupled_pp.core.reports import Record, ValidationRecord
from decoupled_pp.pipeline.meter import StageMeter
from decoupled_pp.pipeline.rules.rule import Done
from decoupled_pp.pipeline.stage import Stage

# The phase that the wait for a packet belongs to: a wait for an evaluation is part of that, not of training.
_WAITS = {
    PacketKind.TRAIN: "wait_in",
    PacketKind.EVALUATE: "evaluate",
    PacketKind.EVALUATION_END: "evaluate",
    PacketKind.SAVE: "save",
    PacketKind.END: "end",
}


class Worker:
    """One stage joined to its two links; it takes measurements, and posts records for the run's log."""

    def __init__(
        self,
        stage: Stage,
        ends: Ends,
        meter: StageMeter,
        save: Callable[[Stage, int], None],
        post: Callable[[Record], None],
    ) -> None:
        self.stage = stage
        self.ends = ends
        self.meter = meter
        self.stream: AbstractContextManager[object] = own_stream(stage.body.device)  # for the stage's device work
        self._save = save  # is given the number of training packets done
        self._post = post
        self._packet: Packet | None = None  # the last one taken, for the notes on errors

    def advance(self) -> bool:
        """Take one packet and do what it asks; return False once that was the END."""
        packet = self.ends.inlet.receive()
        self._packet = packet
        self.meter.begin(packet.number)
        self.meter.lap(_WAITS[packet.kind])
        # Not around `receive`: an error of the link tells more than at which packet it was found.
        with self._errors_named():
            self._do(packet)
        return packet.kind is not PacketKind.END

    def resume(self) -> None:
        """Finish a training packet that was left unfinished, once the next stage has done its part; else nothing."""
        if not self.stage.rule.unfinished:
            return
        with self._errors_named():
            self._count(self.stage.resume(self.ends, self.meter.lap))

    def close(self) -> None:
        """Release both links."""
        self.ends.inlet.close()
        self.ends.outlet.close()

    def _do(self, packet: Packet) -> None:
        if packet.kind is PacketKind.TRAIN:
            self._count(self.stage.train(packet, self.ends, self.meter.lap))
        elif packet.kind is PacketKind.EVALUATE:
            self.stage.evaluate(packet, self.ends.outlet.send)
            self.meter.lap("evaluate")
        else:
            self._mark(packet)

    def _mark(self, packet: Packet) -> None:
        """Pass a marker on, and do what it asks."""
        # First of all, so that the stages behind save or end at the same time as this one, not one after the other.
        self.ends.outlet.send(packet)
        if packet.kind in {PacketKind.SAVE, PacketKind.END}:
            self.stage.rule.settle(self.ends)  # what is on a link is in no stage's part of the checkpoint
        self._flush()  # finds a loss that is not finite before it is saved
        if packet.kind is PacketKind.EVALUATION_END:
            self._report_evaluation()
        elif packet.kind is PacketKind.SAVE:
            self._save(self.stage, packet.number)
            self.meter.lap("save")
        elif packet.kind is PacketKind.END:
            self.stage.end()

    def _count(self, done: Done | None) -> None:
        if done is None:
            return
        packet = done.packet
        weight = 1.0 if self.stage.body.loss.sums else packet.weight
        if self.meter.trained(packet.number, done.loss, packet.samples, weight):
            self._flush()

    def _flush(self) -> None:
        self.meter.flush(self.stage, self.ends.inlet.depth())

    def _report_evaluation(self) -> None:
        score = self.stage.finish_evaluation()  # waits for the device, so the lap comes after it
        self.meter.lap("evaluate")
        self.meter.last_exit = score
        found = self.stage.probe_results()
        self.meter.last_knn = found.get("knn_accuracy")
        if score is None:
            return
        loss, accuracy = score
        record = ValidationRecord(
            stage=self.stage.index,
            step=self.stage.updates,
            samples=self.stage.samples,
            loss=loss,
            accuracy=accuracy,
            knn_accuracy=self.meter.last_knn,
            seconds=self.meter.seconds(),
            training_seconds=self.meter.training_seconds(),
        )
        self._post(record)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Note on an error of the user's code at which packet of which stage it was raised."""
        try:
            yield
        except ReportedError:  # its text says where
            raise
        except ValueError as error:
            self._note(error)
            # torch's words, in batch and instance normalisation; they name neither the packet nor what to do.
            if self._packet is None or "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"stage {self.stage.index}, packet {self._packet.number}: batch normalisation cannot train on a "
                f"micro-batch of {self._packet.samples} sample; leave the last, smaller one out (drop_last=True of a "
                "DataLoader), or raise `data.batch_size`",
                code="batch-too-small",
                key="data.batch_size",
            ) from error
        except (Exception, SystemExit) as error:
            self._note(error)
            raise

    def _note(self, error: Exception | SystemExit) -> None:
        # A note, not an error of another class: the user's own type, traceback and debugger stay what they are.
        if self._packet is not None:
            packet = self._packet
            error.add_note(f"stage {self.stage.index}, {packet.kind.name} packet {packet.number}")


def run(workers: Sequence[Worker]) -> None:
    """Run the stages of this process until the END packet has passed them all.

    One worker is one rank of a distributed run. Several are a pipeline in one process: every kind of packet passes
    every stage, so taking turns, first stage first, keeps at most one packet in each link. On CUDA each stage of a
    process has a stream of its own, so that their work overlaps although one thread issues it. What a rule leaves
    unfinished is finished last stage first, because gradients come back that way.
    """
    running = True
    while running:
        for worker in workers:
            with worker.stream:
                running = worker.advance()
        for worker in reversed(workers):
            with worker.stream:
                worker.resume()
