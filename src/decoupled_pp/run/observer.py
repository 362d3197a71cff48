"""Hands the records of a run on: to the log and the terminal; spans are kept for the trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from decoupled_pp.core.errors import TrainingError
from decoupled_pp.core.reports import CheckpointRecord, NoteRecord, Record, Span, SpansRecord
from decoupled_pp.run.live import LiveView
from decoupled_pp.run.log import RunLog
from decoupled_pp.settings.run import Settings


class RunObserver:
    """Keeps and shows the records of a run on rank 0; does nothing on other ranks."""

    def __init__(self, settings: Settings, log: RunLog | None, step: int | None, notes: Sequence[str] = ()) -> None:
        """Start a view if there is a log."""
        self.spans: defaultdict[int, list[Span]] = defaultdict(list)
        self._log = log
        self._view: LiveView | None = None
        if log is None:
            return
        ranks = 1 if settings.strategy == "backprop" else settings.stages
        exits = ranks if settings.strategy == "decoupled" else 1
        self._view = LiveView(ranks, settings.training.steps, exits=exits)
        for note in notes:
            self._view.note(note)
        if step is not None:
            self._view.note(f"goes on from the checkpoint at step {step}; times count from here")

    def __enter__(self) -> RunObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._view is None or self._log is None:
            return
        self._view.close()
        try:
            self._log.close()
        except TrainingError:
            if kind is None:  # else the error that the run ends with has come first
                raise

    def __call__(self, records: list[Record]) -> None:
        """Take records, on rank 0."""
        if self._view is None or self._log is None:
            return
        self._log.write(records)
        for record in records:
            if isinstance(record, SpansRecord):
                self.spans[record.stage] += record.spans
            elif isinstance(record, CheckpointRecord):
                self._view.note(f"checkpoint at step {record.step}")
            elif isinstance(record, NoteRecord):
                self._view.note(record.text)
        # After the notes: what a stage could not take over is told before its first steps.
        self._view.update(records)
