"""The records that the stages of a run post while it goes, and the report at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from decoupled_pp.core.records import JsonRecord, tuple_of

PHASES = ("wait_in", "forward", "wait_out", "critic", "backward", "step")
"""The phases of a stage's work on a training packet, in order; `evaluate` and `save` are spans of their own."""


@dataclass(frozen=True, kw_only=True)
class Record(JsonRecord):
    """One record of metrics that a stage posts, and one line of `metrics.jsonl`; its class is told by `kind`."""

    kind: ClassVar[str]
    stage: int  # with a baseline, the rank


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """The progress of a stage since its last record of this kind."""

    kind: ClassVar[str] = "train"
    packet: int  # number of its last training packet
    step: int  # optimizer steps done
    samples: int  # training samples done
    loss: float | None  # mean training loss; None if this rank knows no loss, or (in files) it was not finite
    samples_per_second: float
    busy_fraction: float  # share of the time in which the stage computed
    queue: int  # packets that wait for the stage
    lr: float
    seconds: float  # since the start of this run
    training_seconds: float  # those without evaluations and checkpoints


@dataclass(frozen=True, kw_only=True)
class ValidationRecord(Record):
    """Held-out score of one exit."""

    kind: ClassVar[str] = "validation"
    step: int  # optimizer steps done
    samples: int  # training samples done
    loss: float | None  # mean held-out loss per target; None (in files) if it was not finite
    accuracy: float | None  # share of targets classified right; None without class targets
    knn_accuracy: float | None = field(default=None, metadata={"optional": True})  # see `validation.knn`
    seconds: float  # since the start of this run
    training_seconds: float  # those without evaluations and checkpoints


class Span(NamedTuple):
    """Time that a stage spent in one phase of one packet."""

    phase: str  # one of `PHASES`, or `evaluate` or `save`
    start: float  # in seconds; Unix time while the run goes
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
    """Training seconds from one optimizer update to the next, in steady state."""

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class StageSummary(JsonRecord):
    """The size, times and memory of one stage (with a baseline: of one rank) over the whole run."""

    stage: int
    parameters: int  # trained ones, without the critic's
    critic_parameters: int  # 0 without a critic
    saved_activation_bytes_peak: int | None  # most that autograd held for backward passes; None if never measured
    memory_bytes_peak: int  # of the device; on the CPU of the process
    critic_time_fraction: float  # of the time of forward, critic and backward; 0 without a critic
    busy_fraction: float  # share of the time in all phases in which the stage computed
    wait_in_seconds: float  # for packets
    wait_out_seconds: float  # for room in the link behind it
    phase_seconds: Mapping[str, float]  # one of `PHASES` -> its seconds


@dataclass(frozen=True, kw_only=True)
class LinkSummary(JsonRecord):
    """The traffic of one link over the whole run, both its ends added up; the counters are those of `LinkCounters`."""

    sender: int = field(metadata={"key": "from"})  # a stage; with a baseline, a rank
    receiver: int = field(metadata={"key": "to"})
    packets: int
    payload_bytes_forward: int
    payload_bytes_backward: int
    control_bytes_forward: int
    control_bytes_backward: int
    training_bytes_forward: int


@dataclass(frozen=True)
class FinalScores(JsonRecord):
    """The last scores of the network's own head."""

    train_loss: float | None  # mean over the last metrics interval
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
