"""Keeps the metric records of a run on disk: `metrics.jsonl`, and TensorBoard events if wanted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from decoupled_pp.core.errors import TrainingError, UsageError
from decoupled_pp.core.records import write_json
from decoupled_pp.core.reports import RECORDS, Record, SpansRecord, TrainRecord, ValidationRecord, read_record
from decoupled_pp.run.checkpoints.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class RunLog:
    """The log of one run, written by rank 0 alone.

    `metrics.jsonl` holds every record but the spans (those belong to the trace), one JSON object a line. JSON has no
    NaN or infinity: such a number is written as `null`. A run that goes on from `resume_step` will write later steps
    again, so their records are cut from `metrics.jsonl` and hidden in TensorBoard; None keeps all. That is done with
    the first record: a run that is refused before it trains has cut nothing.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int | None) -> None:
        """Check what is there, and that the file can be written; nothing in it changes yet."""
        self._folder = folder
        self._path = folder / METRICS_FILE
        self._tensorboard = tensorboard
        self._resume_step = resume_step
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None
        self._report_before = threading.excepthook
        with self._named_if_full():
            if self._path.exists():
                _read_objects(self._path)
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        if tensorboard:
            threading.excepthook = self._report_from_thread

    def write(self, records: Iterable[Record]) -> None:
        """Append records and flush, so that a killed run keeps all that was written before."""
        kept = [record for record in records if not isinstance(record, SpansRecord)]
        if not kept:
            return
        with self._named_if_full():
            # One write call for all lines: a reader meets at most one half-written line, the last.
            file = self._file or self._open()
            self._refuse_gone(file)
            file.write("".join(map(_line, kept)))
            file.flush()
            if self._events is not None:
                for record in kept:
                    _add_scalars(self._events, record)
                self._events.flush()

    def _open(self) -> TextIO:
        _truncate(self._path, self._resume_step)
        if self._tensorboard:
            self._events = _open_events(self._folder / TENSORBOARD_FOLDER, self._resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        return self._file

    def _refuse_gone(self, file: TextIO) -> None:
        """Raise TrainingError if somebody has removed the run folder: what is written now would be nowhere."""
        try:
            is_there = os.path.samestat(self._path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise TrainingError(
                f"{self._path} was removed or replaced while the run went on, and its earlier records are lost; leave "
                "the run folder alone, then resume",
                code="run-log-gone",
            )

    @contextmanager
    def _named_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise TrainingError(
                f"cannot write the run log in {self._folder}: {reason}; free or mend the disk, then resume",
                code="run-log-not-written",
            ) from error

    def close(self) -> None:
        """Close the files and end TensorBoard's writer thread; safe to call twice."""
        try:
            with self._named_if_full():
                if self._file is not None:
                    self._file.close()
                if self._events is not None:
                    events = self._events
                    self._events = None
                    events.close()
        finally:
            if threading.excepthook == self._report_from_thread:
                threading.excepthook = self._report_before

    def _report_from_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard's writing thread dies of a full disk with a traceback, and the next flush here raises it again.
        is_of_tensorboard = args.thread is not None and type(args.thread).__module__.startswith("tensorboard.")
        if not (is_of_tensorboard and isinstance(args.exc_value, OSError)):
            self._report_before(args)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a `metrics.jsonl`; those of a kind that this version does not know are left out.

    A half-written last line (a run killed or still going) is left out as well.
    """
    objects = [content for content in _read_objects(path) if content.get("kind") in RECORDS]
    try:
        return [read_record(content) for content in objects]
    except KeyError as error:
        raise UsageError(
            f"{path} holds a record that lacks {error}; remove its line or the file", code="metrics-damaged"
        ) from error


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of the file, whatever they are."""
    # Bytes, not text: a half-written last line may end inside a UTF-8 character.
    text = path.read_bytes()
    lines = text.splitlines()
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict) and isinstance(content.get("step") or 0, int):
            objects.append(content)
        elif number < len(lines) or text.endswith(b"\n"):
            start = line[:60].decode(errors="replace")
            raise UsageError(
                f"{path} line {number} is no record: {start!r}; remove the line or the file",
                code="metrics-damaged",
            )
    return objects


def _truncate(path: Path, last_step: int | None) -> None:
    """Drop a half-written last line and all records of steps after `last_step`, in one atomic replacement."""
    # Objects, not records: what a later version wrote must survive a resume by this one.
    # A record without a step is of no step and always stays.
    kept = [content for content in _read_objects(path) if last_step is None or (content.get("step") or 0) <= last_step]
    write_atomically(path, "".join(map(_line, kept)))


def _line(content: Mapping[str, Any]) -> str:
    return write_json(content) + "\n"


def _open_events(folder: Path, resume_step: int | None) -> SummaryWriter:
    # Imported here: it takes seconds, and only rank 0 of a run with TensorBoard needs it.
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides events with step >= purge_step; those of the resumed step itself are not written again.
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge_step)


def _add_scalars(events: SummaryWriter, record: Record) -> None:
    if not isinstance(record, TrainRecord | ValidationRecord):
        return
    for tag, value in _scalars(record).items():
        if value is not None:
            events.add_scalar(f"{tag}/stage{record.stage}", value, record.step)


def _scalars(record: TrainRecord | ValidationRecord) -> dict[str, float | None]:
    """Returns TensorBoard tag -> value, before `/stage<k>` is appended to the tag."""
    if isinstance(record, ValidationRecord):
        return {"loss/validation": record.loss, "accuracy/validation": record.accuracy}
    return {
        "loss/train": record.loss,
        "throughput/samples_per_second": record.samples_per_second,
        "busy_fraction": record.busy_fraction,
        "queue": record.queue,
        "lr": record.lr,
    }
