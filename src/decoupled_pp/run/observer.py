"""What becomes of the metric records of a run: the log, the terminal, and the spans for the trace."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from decoupled_pp.core.reports import Record
from decoupled_pp.run.live import LiveView
from decoupled_pp.run.log import RunLog
from decoupled_pp.settings.run import Settings


class RunObserver:
    """On rank 0: records to the run's log and the terminal, spans kept for the trace. Elsewhere nothing."""

    def __init__(self, settings: Settings, log: RunLog | None, step: int | None) -> None:
        """Start a view if there is a log.

        Args:
            settings: The run.
            log: Where records go (rank 0), or None.
            step: Where a resumed run goes on, or None.
        """
        self.spans: defaultdict[int, list[Any]] = defaultdict(list)
        self._log = log
        ranks = 1 if settings.strategy == "backprop" else settings.stages
        exits = ranks if settings.strategy == "decoupled" else 1
        self._view = LiveView(ranks, settings.training.steps, exits=exits) if log is not None else None
        if self._view is not None and step is not None:
            self._view.note(f"goes on from the checkpoint at step {step}; times count from here")

    def __enter__(self) -> RunObserver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._view is not None and self._log is not None:
            self._view.close()
            self._log.close()

    def __call__(self, records: list[Record]) -> None:
        """Take records, on rank 0."""
        if self._view is None or self._log is None:
            return
        self._log.write(records)
        for record in records:
            if record["kind"] == "spans":
                self.spans[record["stage"]] += record["spans"]
            elif record["kind"] == "checkpoint":
                self._view.note(f"checkpoint at step {record['step']}")
            elif record["kind"] == "note":
                self._view.note(record["text"])
        self._view.update(records)  # after the notes: what a stage could not take over comes before its first steps
