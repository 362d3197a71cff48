"""Keeps the metric records of a run on disk: `metrics.jsonl`, and TensorBoard events if wanted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoupled_pp.core.errors import UsageError
from decoupled_pp.core.reports import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_TAGS = {
    "train": {
        "loss": "loss/train",
        "samples_per_second": "throughput/samples_per_second",
        "busy_fraction": "busy_fraction",
        "queue": "queue",
        "lr": "lr",
    },
    "validation": {"loss": "loss/validation", "accuracy": "accuracy/validation"},
}
"""Record kind -> field -> TensorBoard tag; `/stage<k>` is appended."""


class RunLog:
    """The log of one run, written by rank 0 alone.

    `metrics.jsonl` holds every record but the spans (those belong to the trace), one JSON object a line. JSON has no
    NaN or infinity: such a number is written as `null`.

    Args:
        folder: The run folder; made if missing.
        tensorboard: Write TensorBoard events under `folder/tensorboard` as well; their step is the optimizer step.
        resume_step: The optimizer step that training goes on from: records of later steps are cut from
            `metrics.jsonl` and hidden in TensorBoard, for they will be written again. None appends to what is there.

    Raises:
        UsageError: An existing `metrics.jsonl` is damaged before its last line.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = _open_events(folder / TENSORBOARD_FOLDER, resume_step) if tensorboard else None

    def write(self, records: Iterable[Record]) -> None:
        """Append records and flush, so that a killed run keeps all that was written before."""
        kept = [record for record in records if record.get("kind") != "spans"]
        if not kept:
            return
        # One write call for all lines: a reader meets at most one half-written line, the last.
        self._file.write("".join(map(_line, kept)))
        self._file.flush()
        if self._events is not None:
            for record in kept:
                _add_scalars(self._events, record)
            self._events.flush()

    def close(self) -> None:
        """Close the files and end TensorBoard's writer thread; safe to call twice."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None


def read_records(path: Path) -> list[Record]:
    """Return all records of a `metrics.jsonl`; a half-written last line (a run killed or still going) is left out.

    Raises:
        UsageError: A line before the last is no JSON object.
    """
    # Bytes, not text: a half-written last line may end inside a UTF-8 character.
    lines = path.read_bytes().splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UsageError(f"{path} line {number} is no JSON object: {line[:60]!r}; remove the line or the file")
    return records


def _truncate(path: Path, last_step: int | None) -> None:
    """Drop a half-written last line and all records of steps after `last_step`, in one atomic replacement."""
    kept = [record for record in read_records(path) if last_step is None or _step(record) <= last_step]
    replacement = path.with_name(path.name + ".new")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _step(record: Record) -> float:
    """The optimizer step of a record; a record without one belongs to no step and always stays."""
    step = record.get("step")
    return float(step) if step is not None else -math.inf


def _line(record: Record) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, for JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _open_events(folder: Path, resume_step: int | None) -> SummaryWriter:
    # Imported here: it takes seconds, and only rank 0 of a run with TensorBoard needs it.
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides events with step >= purge_step; those of the resumed step itself are not written again.
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge_step)


def _add_scalars(events: SummaryWriter, record: Record) -> None:
    for field, tag in _TAGS.get(record["kind"], {}).items():
        value = record.get(field)
        if value is not None:
            events.add_scalar(f"{tag}/stage{record['stage']}", value, record["step"])
