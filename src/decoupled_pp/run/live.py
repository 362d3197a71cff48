"""Shows a run while it goes: a live table on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from decoupled_pp.core.reports import Record

TERMINAL_SECONDS = 0.25
PLAIN_SECONDS = 5.0


class LiveView:
    """What rank 0 prints of the records of all stages.

    It draws only inside `update`, `note` and `close`: there is no background thread.

    Args:
        stages: Number of stages; the table has a row for each.
        steps: Optimizer steps that every stage will do.
        console: Where to print; default: standard output.
        exits: How many of the stages are scored in an evaluation; default: all.
        interval_seconds: Shortest time between two refreshes; default: 0.25 s on a terminal, 5 s for plain lines.
    """

    def __init__(
        self,
        stages: int,
        steps: int,
        console: Console | None = None,
        interval_seconds: float | None = None,
        exits: int | None = None,
    ) -> None:
        self._stages, self._steps, self._exits = stages, steps, stages if exits is None else exits
        self._console = console or Console()
        self._tty = self._console.is_terminal and not self._console.is_dumb_terminal
        default = TERMINAL_SECONDS if self._tty else PLAIN_SECONDS
        self._interval = default if interval_seconds is None else interval_seconds
        self._train: dict[int, Record] = {}
        self._validation: dict[int, Record] = {}
        self._passes: dict[int, dict[int, Record]] = {}  # optimizer step -> stage -> its validation
        self._first: Record | None = None
        self._drawn = -math.inf
        self._stale = self._order_said = False
        self._live: Live | None = None

    def update(self, records: Iterable[Record]) -> None:
        """Take in new records; redraw if the last time is long enough ago. Kinds that are not shown are ignored."""
        for record in records:
            if record.get("kind") == "train":
                self._train[record["stage"]] = record
                self._first = self._first or record
                self._stale = True
            elif record.get("kind") == "validation":
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

    def _take_validation(self, record: Record) -> None:
        stage, step = record["stage"], record["step"]
        self._validation[stage] = record
        self._stale = self._stale or self._tty
        if self._tty:
            return
        # Stages reach the same validation one after another: one line when the last of them has.
        done = self._passes.setdefault(step, {})
        done[stage] = record
        if len(done) == self._exits:
            self._note_validation(step, self._passes.pop(step))

    def _say_order(self) -> None:
        """Before the first line with values of several stages."""
        if not self._order_said and self._stages > 1 and not self._tty:
            self.note(f"values are listed per stage, stage 0 first, stage {self._stages - 1} last")
        self._order_said = True

    def _note_validation(self, step: int, done: dict[int, Record]) -> None:
        self._say_order()
        parts = [f"validation at step {step}", "held-out loss " + self._join(done, "loss", _loss)]
        if any(record.get("accuracy") is not None for record in done.values()):
            parts.append("accuracy % " + self._join(done, "accuracy", _percent))
        self.note(_clock(max(record["seconds"] for record in done.values())) + " | ".join(parts))

    def _draw(self) -> None:
        if not self._tty:
            self._say_order()
            self.note(self._plain_line())
        elif self._live is None:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        else:
            self._live.update(self._table(), refresh=True)
        self._drawn, self._stale = time.monotonic(), False

    def _plain_line(self) -> str:
        steps = sorted({self._train[stage]["step"] if stage in self._train else 0 for stage in range(self._stages)})
        progress = f"step {steps[0]}" + (f"-{steps[-1]}" if len(steps) > 1 else "") + f"/{self._steps}"
        parts = [
            progress,
            "loss " + self._join(self._train, "loss", _loss),
            "samples/s " + self._join(self._train, "samples_per_second", _rate),
            "busy % " + self._join(self._train, "busy_fraction", _whole_percent),
            "queue " + self._join(self._train, "queue", str),
        ]
        left = self._seconds_left()
        if left is not None:
            parts.append(f"about {_duration(left)} left")
        return _clock(self._seconds()) + " | ".join(parts)

    def _join(self, records: dict[int, Record], field: str, form: Callable[[Any], str]) -> str:
        return " ".join(_value(records.get(stage), field, form) for stage in range(self._stages))

    def _table(self) -> Table:
        left = self._seconds_left()
        caption = f"{_duration(self._seconds())} elapsed"
        if left is not None:
            caption += f", about {_duration(left)} left"
        table = Table(caption=caption, caption_justify="left")
        accuracy = any(record.get("accuracy") is not None for record in self._validation.values())
        titles = ["stage", "step", "train loss", "held-out loss", "accuracy %", "samples/s", "busy %", "queue"]
        for title in titles:
            if accuracy or title != "accuracy %":
                table.add_column(title, justify="right", no_wrap=True)
        for stage in range(self._stages):
            table.add_row(*self._row(stage, accuracy))
        return table

    def _row(self, stage: int, accuracy: bool) -> list[str]:
        train, held_out = self._train.get(stage), self._validation.get(stage)
        cells = [str(stage), f"{train['step'] if train else 0}/{self._steps}", _value(train, "loss", _loss)]
        cells.append(_value(held_out, "loss", _loss))
        if accuracy:
            cells.append(_value(held_out, "accuracy", _percent))
        cells.append(_value(train, "samples_per_second", _rate))
        cells.append(_value(train, "busy_fraction", _whole_percent))
        cells.append(_value(train, "queue", str))
        return cells

    def _seconds(self) -> float:
        """Seconds since the start of the run, as of the newest record."""
        return max((record["seconds"] for record in (*self._train.values(), *self._validation.values())), default=0.0)

    def _seconds_left(self) -> float | None:
        """A guess from the pace of the last stage since the first record seen; None without a pace, or at the end."""
        last = self._train.get(self._stages - 1)
        if last is None or self._first is None or last["step"] <= self._first["step"]:
            return None
        pace: float = (last["seconds"] - self._first["seconds"]) / (last["step"] - self._first["step"])
        return max(0.0, pace * (self._steps - last["step"])) or None


def _value(record: Record | None, field: str, form: Callable[[Any], str]) -> str:
    value = record.get(field) if record else None
    return "-" if value is None else form(value)


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _whole_percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60} s"


def _clock(seconds: float) -> str:
    return f"[{seconds:8.1f} s] "
