"""The records that the stages of a run post while it goes, and the report at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from decoupled_pp.core.records import JsonRecord, tuple_of

PHASES = ("wait_in", "forward", "wait_out", "critic", "backward", "step")
"""The phases of a stage's work on a training packet, in order; they name the spans in metrics and traces.

Evaluation and checkpoints are spans of their own, `evaluate` and `save`.
"""


@dataclass(frozen=True, kw_only=True)
class Record(JsonRecord):
    """One record of metrics that a stage posts, and one line of `metrics.jsonl`; its class is told by `kind`.

    Attributes:
        stage: Index of the stage; with a baseline, the rank.
    """

    kind: ClassVar[str]
    stage: int


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """The progress of a stage since its last record of this kind.

    Attributes:
        packet: Number of its last training packet.
        step: Optimizer steps done.
        samples: Training samples done.
        loss: Mean training loss since the record before; None if this rank knows no loss, or it was not finite.
        samples_per_second: Samples per second since the record before.
        busy_fraction: Share of that time in which the stage computed.
        queue: Packets that wait for the stage.
        lr: Learning rate now.
        seconds: Seconds since the start of this run.
        training_seconds: Seconds since the start without evaluations and checkpoints.
    """

    kind: ClassVar[str] = "train"
    packet: int
    step: int
    samples: int
    loss: float | None
    samples_per_second: float
    busy_fraction: float
    queue: int
    lr: float
    seconds: float
    training_seconds: float


@dataclass(frozen=True, kw_only=True)
class ValidationRecord(Record):
    """Held-out score of one exit.

    Attributes:
        step: Optimizer steps done.
        samples: Training samples done.
        loss: Mean held-out loss per target; None (in files) if it was not finite.
        accuracy: Share of targets classified right; None without class targets.
        knn_accuracy: Share classified right by the nearest training samples, if `validation.knn` asks for it.
        seconds: Seconds since the start of this run.
        training_seconds: Seconds since the start without evaluations and checkpoints.
    """

    kind: ClassVar[str] = "validation"
    step: int
    samples: int
    loss: float | None
    accuracy: float | None
    knn_accuracy: float | None = field(default=None, metadata={"optional": True})
    seconds: float
    training_seconds: float


class Span(NamedTuple):
    """Time that a stage spent in one phase of one packet.

    Attributes:
        phase: One of `PHASES`, or `evaluate` or `save`.
        start: In seconds; Unix time while the run goes.
        seconds: Duration.
        packet: Number of the packet.
    """

    phase: str
    start: float
    seconds: float
    packet: int

    @property
    def end(self) -> float:
        """When the phase ended, in seconds of the same clock as `start`."""
        return self.start + self.seconds


@dataclass(frozen=True, kw_only=True)
class SpansRecord(Record):
    """Spans of a stage, for the trace; they are not kept in `metrics.jsonl`."""

    kind: ClassVar[str] = "spans"
    spans: tuple[Span, ...] = field(metadata={"read": tuple_of(Span._make)})


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """Tells that the checkpoint after optimizer step `step` is complete."""

    kind: ClassVar[str] = "checkpoint"
    step: int


@dataclass(frozen=True, kw_only=True)
class NoteRecord(Record):
    """One line for the user, such as what could not be taken over from a checkpoint."""

    kind: ClassVar[str] = "note"
    text: str


RECORDS: Mapping[str, type[Record]] = {
    one.kind: one for one in (TrainRecord, ValidationRecord, SpansRecord, CheckpointRecord, NoteRecord)
}
"""Kind -> the class of its records."""


def read_record(content: Mapping[str, Any]) -> Record:
    """Builds a posted record from its JSON object.

    Raises:
        KeyError: Its kind is unknown, or one of its keys is missing.
    """
    return RECORDS[content["kind"]].from_json(content)


@dataclass(frozen=True)
class Exit(JsonRecord):
    """Held-out score of one exit: the stages up to `stage`, and its critic (the network's own head in the last).

    Attributes:
        stage: Index of the stage.
        val_loss: Mean loss per target, None if there was no evaluation.
        val_accuracy: Share of targets classified right, None without class targets.
        knn_accuracy: Share classified right by the nearest training samples (`validation.knn`), None if not asked for.
    """

    stage: int
    val_loss: float | None
    val_accuracy: float | None
    knn_accuracy: float | None = None


@dataclass(frozen=True)
class StepSeconds(JsonRecord):
    """Training seconds from one optimizer update to the next, in steady state.

    Attributes:
        mean: Mean.
        p50: Median.
        p95: 95th percentile.
    """

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class StageSummary(JsonRecord):
    """The size, times and memory of one stage (with a baseline: of one rank) over the whole run.

    Attributes:
        stage: Index of the stage; with a baseline, the rank.
        parameters: Trained parameters, without the critic's.
        critic_parameters: Parameters of the critic; 0 without one.
        saved_activation_bytes_peak: Most bytes that autograd held for backward passes; None if never measured.
        memory_bytes_peak: Most memory of the device (on the CPU: of the process), in bytes.
        critic_time_fraction: Critic's share of the time of forward, critic and backward; 0 without a critic.
        busy_fraction: Share of the time in all phases in which the stage computed.
        wait_in_seconds: Seconds in which it waited for packets.
        wait_out_seconds: Seconds in which it waited for room in the link behind it.
        phase_seconds: Phase (`PHASES`) -> its seconds.
    """

    stage: int
    parameters: int
    critic_parameters: int
    saved_activation_bytes_peak: int | None
    memory_bytes_peak: int
    critic_time_fraction: float
    busy_fraction: float
    wait_in_seconds: float
    wait_out_seconds: float
    phase_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LinkSummary(JsonRecord):
    """The traffic of one link over the whole run, both its ends added up; the counters are those of `LinkCounters`.

    Attributes:
        sender: The stage (with a baseline: the rank) that sends activations; `from` in JSON.
        receiver: The one that receives them; `to` in JSON.
    """

    sender: int = field(metadata={"key": "from"})
    receiver: int = field(metadata={"key": "to"})
    packets: int
    payload_bytes_forward: int
    payload_bytes_backward: int
    control_bytes_forward: int
    control_bytes_backward: int
    training_bytes_forward: int


@dataclass(frozen=True)
class FinalScores(JsonRecord):
    """The last scores of the network's own head.

    Attributes:
        train_loss: Mean training loss over the last metrics interval.
        val_loss: Held-out loss at the last evaluation.
        val_accuracy: Held-out accuracy at the last evaluation.
    """

    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Report(JsonRecord):
    """The outcome of a run, the same on every rank; its parts can be read by the keys of `summary.json`, too.

    Attributes:
        steps: Optimizer steps per stage in all, resumed ones included.
        seconds: Wall-clock seconds of this run.
        training_seconds: Those seconds without evaluations and checkpoints.
        step_seconds: Training seconds from one optimizer update of the last stage to the next in steady state
            (without the first tenth of them); None with too few updates.
        samples_per_second: Training samples per training second of this run, through the last stage.
        final: Last scores of the network's own head.
        exits: Held-out score of every exit at the last evaluation.
        per_stage: Parameters, times and memory of every stage.
        links: Packets and bytes of every link.
        stopped: Why the run ended before its last step (a request to stop), or None.
    """

    steps: int
    seconds: float
    training_seconds: float
    step_seconds: StepSeconds | None = field(metadata={"read": StepSeconds.from_json})
    samples_per_second: float
    final: FinalScores = field(metadata={"read": FinalScores.from_json})
    exits: tuple[Exit, ...] = field(metadata={"read": tuple_of(Exit.from_json)})
    per_stage: tuple[StageSummary, ...] = field(metadata={"read": tuple_of(StageSummary.from_json)})
    links: tuple[LinkSummary, ...] = field(metadata={"read": tuple_of(LinkSummary.from_json)})
    stopped: str | None = None

    @property
    def train_loss(self) -> float | None:
        """Mean training loss of the last stage over its last metrics interval."""
        return self.final.train_loss
