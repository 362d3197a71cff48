"""What a run reports: metric records, scores of its exits, and the report at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
"""One JSON-able line of metrics; always has `kind` and `stage`."""


PHASES = ("wait_in", "forward", "wait_out", "critic", "backward", "step")
"""What a stage does with a training packet, in order; the names of the spans in metrics and traces.

Evaluation and checkpoints are spans of their own, `evaluate` and `save`.
"""


@dataclass(frozen=True)
class Exit:
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
class Report:
    """What a run did, the same on every rank. The dictionaries have the keys of `summary.json`.

    Attributes:
        steps: Optimizer steps per stage in all, resumed ones included.
        seconds: Wall-clock seconds of this run.
        training_seconds: The same without evaluations and checkpoints.
        step_seconds: `mean`, `p50` and `p95` of the training seconds from one optimizer update of the last stage to
            the next in steady state (without the first tenth of them); None with too few updates.
        samples_per_second: Training samples per training second of this run, through the last stage.
        train_loss: Mean training loss of the last stage over its last metrics interval.
        exits: Held-out score of every exit at the last evaluation.
        per_stage: Parameters, times and memory of every stage.
        links: Packets and bytes of every link.
        stopped: Why the run ended before its last step (a request to stop), or None.
    """

    steps: int
    seconds: float
    training_seconds: float
    step_seconds: dict[str, float] | None
    samples_per_second: float
    train_loss: float | None
    exits: tuple[Exit, ...]
    per_stage: tuple[Record, ...]
    links: tuple[Record, ...]
    stopped: str | None = None
