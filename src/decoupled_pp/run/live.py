"""Shows a run while it goes: a live table on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from decoupled_pp.core.reports import Record, TrainRecord, ValidationRecord

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 5.0

_Shown = TypeVar("_Shown", TrainRecord, ValidationRecord)


class LiveView:
    """Prints the records of all stages, on rank 0; draws only when it is called: there is no background thread."""

    def __init__(
        self,
        stages: int,
        steps: int,
        console: Console | None = None,
        interval_seconds: float | None = None,
        exits: int | None = None,  # stages that an evaluation scores; None: all
    ) -> None:
        self._stages = stages
        self._steps = steps
        self._exits = stages if exits is None else exits
        self._console = console or Console()
        self._tty = self._console.is_terminal and not self._console.is_dumb_terminal
        default = TERMINAL_SECONDS if self._tty else PLAIN_SECONDS
        self._interval = default if interval_seconds is None else interval_seconds
        self._train: dict[int, TrainRecord] = {}
        self._validation: dict[int, ValidationRecord] = {}
        self._passes: dict[int, dict[int, ValidationRecord]] = {}  # optimizer step -> stage -> its validation
        self._first: TrainRecord | None = None  # the pace counts from here
        self._drawn = -math.inf
        self._stale = False
        self._order_said = False
        self._live: Live | None = None

    def update(self, records: Iterable[Record]) -> None:
        """Take in new records; redraw if the last time is long enough ago. Kinds that are not shown are ignored."""
        for record in records:
            if isinstance(record, TrainRecord):
                self._train[record.stage] = record
                self._first = record if self._first is None else self._first
                self._stale = True
            elif isinstance(record, ValidationRecord):
                self._take_validation(record)
        if self._stale and time.monotonic() - self._drawn >= self._interval:
            self._draw()

    def note(self, text: str) -> None:
        """Print a line above the table."""
        printable = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
        # A Text object: square brackets in a path or an error must not be taken for rich's markup.
        self._console.print(Text(printable), soft_wrap=True)

    def close(self) -> None:
        """Show the last state and give the terminal back; safe to call twice."""
        for step in sorted(self._passes):
            self._note_validation(step, self._passes.pop(step))
        if self._stale:
            self._draw()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take_validation(self, record: ValidationRecord) -> None:
        self._validation[record.stage] = record
        if self._tty:
            self._stale = True
            return
        # Stages reach the same validation one after another: one line when the last of them has.
        done = self._passes.setdefault(record.step, {})
        done[record.stage] = record
        if len(done) == self._exits:
            self._note_validation(record.step, self._passes.pop(record.step))

    def _say_order(self) -> None:
        """Say once, before the first line with values of several stages, in which order they are."""
        if not self._order_said and self._stages > 1 and not self._tty:
            self.note(f"values are listed per stage, stage 0 first, stage {self._stages - 1} last")
        self._order_said = True

    def _note_validation(self, step: int, done: Mapping[int, ValidationRecord]) -> None:
        self._say_order()
        parts = [f"validation at step {step}", "held-out loss " + self._join(done, _loss)]
        if _have_accuracy(done):
            parts.append("accuracy % " + self._join(done, _accuracy))
        self.note(_clock(max(record.seconds for record in done.values())) + " | ".join(parts))

    def _draw(self) -> None:
        if not self._tty:
            self._say_order()
            self.note(self._plain_line())
        elif self._live is None:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        else:
            self._live.update(self._table(), refresh=True)
        self._drawn = time.monotonic()
        self._stale = False

    def _plain_line(self) -> str:
        steps = {self._step(stage) for stage in range(self._stages)}
        first, last = min(steps), max(steps)
        done = str(first) if first == last else f"{first}-{last}"
        parts = [
            f"step {done}/{self._steps}",
            "loss " + self._join(self._train, _loss),
            *(f"{title} {self._join(self._train, cell)}" for title, cell in _PACE.items()),
        ]
        left = self._seconds_left()
        if left is not None:
            parts.append(f"about {_duration(left)} left")
        return _clock(self._seconds()) + " | ".join(parts)

    def _step(self, stage: int) -> int:
        """Returns the optimizer step that a stage has told; 0 before its first record."""
        return self._train[stage].step if stage in self._train else 0

    def _join(self, records: Mapping[int, _Shown], cell: Callable[[_Shown], str]) -> str:
        """Returns one cell per stage, "-" for stages without a record."""
        return " ".join(_cell(records.get(stage), cell) for stage in range(self._stages))

    def _table(self) -> Table:
        left = self._seconds_left()
        caption = f"{_duration(self._seconds())} elapsed"
        if left is not None:
            caption += f", about {_duration(left)} left"
        table = Table(caption=caption, caption_justify="left")
        accuracy = _have_accuracy(self._validation)
        rows = [self._row(stage, accuracy) for stage in range(self._stages)]
        for title in rows[0]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        return table

    def _row(self, stage: int, accuracy: bool) -> dict[str, str]:
        train = self._train.get(stage)
        held_out = self._validation.get(stage)
        row = {"stage": str(stage), "step": f"{self._step(stage)}/{self._steps}"}
        row |= {"train loss": _cell(train, _loss), "held-out loss": _cell(held_out, _loss)}
        if accuracy:
            row["accuracy %"] = _cell(held_out, _accuracy)
        return row | {title: _cell(train, cell) for title, cell in _PACE.items()}

    def _seconds(self) -> float:
        """Returns the seconds since the start of the run, as of the newest record."""
        trained = [record.seconds for record in self._train.values()]
        validated = [record.seconds for record in self._validation.values()]
        return max([*trained, *validated], default=0.0)

    def _seconds_left(self) -> float | None:
        """Returns a guess from the pace of the last stage; None without a pace, or at the end."""
        # Only steps since the first record count: a resumed run took no time for those before.
        last = self._train.get(self._stages - 1)
        if last is None or self._first is None or last.step <= self._first.step:
            return None
        pace = (last.seconds - self._first.seconds) / (last.step - self._first.step)
        return max(0.0, pace * (self._steps - last.step)) or None


def _cell(record: _Shown | None, form: Callable[[_Shown], str]) -> str:
    return "-" if record is None else form(record)


def _loss(record: TrainRecord | ValidationRecord) -> str:
    return "-" if record.loss is None else f"{record.loss:.4f}"


def _accuracy(record: ValidationRecord) -> str:
    return "-" if record.accuracy is None else f"{100 * record.accuracy:.2f}"


def _rate(record: TrainRecord) -> str:
    rate = record.samples_per_second
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


_PACE: dict[str, Callable[[TrainRecord], str]] = {
    "samples/s": _rate,
    "busy %": lambda record: f"{100 * record.busy_fraction:.0f}",
    "queue": lambda record: str(record.queue),
}


def _have_accuracy(records: Mapping[int, ValidationRecord]) -> bool:
    return any(record.accuracy is not None for record in records.values())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60} s"


def _clock(seconds: float) -> str:
    return f"[{seconds:8.1f} s] "
