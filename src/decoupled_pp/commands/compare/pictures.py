"""Draws a comparison as SVG: timelines on one scale, quality against samples and time, speed, memory."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.core.reports import Record
from decoupled_pp.pipeline.meter import PAUSES
from decoupled_pp.run.plots import STYLE, add_legend, draw_row

FLUSHES = 2
"""Flushes of the slowest pipeline that the timelines show."""

_WIDTH = 11.0


def timelines(runs: Sequence[Run], micro_batches: int) -> str:
    """One panel per contender, all over the same length of time, each beginning at an update of its last rank."""
    firsts = [run for run in runs if run.repeat == 0 and any(run.spans.values())]
    width = max((_seconds_per_micro_batch(run) for run in firsts), default=0.0) * micro_batches * FLUSHES
    rows = sum(len(run.spans) for run in firsts)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.34 * rows + 0.42 * len(firsts)), layout="constrained")
        panels = figure.subplots(
            max(1, len(firsts)), 1, squeeze=False, height_ratios=[len(run.spans) + 0.6 for run in firsts] or None
        )
        for axes, run in zip(panels[:, 0], firsts, strict=False):
            start = _start(run, width)
            for position, (_, spans) in enumerate(sorted(run.spans.items())):
                draw_row(axes, position, spans, start, start + width)
            axes.set_xlim(0, width * 1e3)
            axes.set_ylim(len(run.spans) - 0.5, -0.5)
            axes.set_yticks(range(len(run.spans)), [f"rank {rank}" for rank in sorted(run.spans)])
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_title(run.contender.name)
            if run is not firsts[-1]:
                axes.set_xticklabels([])
        panels[-1, 0].set_xlabel("milliseconds, the same scale for all; numbers: micro-batches in forward")
        spans = [span for run in firsts for row in run.spans.values() for span in row if span[0] not in PAUSES]
        add_legend(figure, spans)
        return _svg(figure)


def quality(runs: Sequence[Run], contenders: Sequence[Contender], target: float | None) -> str:
    """Held-out loss of every run against samples seen, and against training time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
        by_samples, by_time = figure.subplots(1, 2, sharey=True)
        for number, contender in enumerate(contenders):
            for run in (one for one in runs if one.contender.name == contender.name):
                style = _line(number, run)
                losses = [math.nan if record["loss"] is None else record["loss"] for record in run.validations]
                by_samples.plot([record["samples"] for record in run.validations], losses, **style)
                by_time.plot([record["training_seconds"] for record in run.validations], losses, **style)
        for axes in (by_samples, by_time):
            axes.grid(alpha=0.25, linewidth=0.6)
            if target is not None:
                axes.axhline(target, color="#888888", linewidth=0.8, linestyle=":")
        by_samples.xaxis.set_major_formatter(EngFormatter(sep=""))
        by_samples.set_xlabel("samples trained on")
        by_samples.set_ylabel("held-out loss")
        by_time.set_xlabel("training seconds (evaluations not counted)")
        by_time.legend(loc="upper right", framealpha=0.9, edgecolor="none", fontsize=8)
        return _svg(figure)


def bars(rows: dict[str, dict[str, Any]], key: str, title: str, form: Callable[[float], str]) -> str:
    """A bar per contender: the median, and a line from the least to the greatest of the repeats."""
    known = {name: row[key] for name, row in rows.items() if row[key] is not None}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH / 2, 0.8 + 0.32 * max(1, len(known))), layout="constrained")
        axes: Axes = figure.add_subplot()
        for position, (name, spread) in enumerate(known.items()):
            colour = _colour(list(rows).index(name))
            axes.barh(position, spread.median, color=colour, height=0.6)
            axes.plot([spread.low, spread.high], [position, position], color="black", linewidth=1.2)
            axes.text(max(spread.high, spread.median), position, f" {form(spread.median)}", va="center", fontsize=8)
        axes.set_yticks(range(len(known)), list(known))
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title(title)
        return _svg(figure)


def _line(number: int, run: Run) -> dict[str, Any]:
    label: Record = {"label": run.contender.name} if run.repeat == 0 else {}
    dashes = {"linestyle": "--"} if run.contender.name != run.contender.strategy else {}
    return {"color": _colour(number), "linewidth": 1.3, "alpha": 0.85, "marker": ".", **label, **dashes}


def _colour(number: int) -> str:
    return matplotlib.colors.to_hex(matplotlib.colormaps["tab10"](number % 10))


def _updates(run: Run) -> list[tuple[float, int]]:
    """(end of the update, micro-batch) of the last rank that recorded some."""
    rows = (spans for _, spans in sorted(run.spans.items(), reverse=True))
    ends = ([(start + took, packet) for phase, start, took, packet in row if phase == "step"] for row in rows)
    return next((one for one in ends if one), [])


def _start(run: Run, width: float) -> float:
    """The end of an update, if possible one that no evaluation or checkpoint follows within `width` seconds."""
    ends = [end for end, _ in _updates(run)] or [0.0]
    pauses = [(at, at + took) for spans in run.spans.values() for phase, at, took, _ in spans if phase in PAUSES]
    free = [end for end in ends if end + width <= ends[-1] and not any(a < end + width and b > end for a, b in pauses)]
    return free[len(free) // 2] if free else ends[len(ends) // 3]


def _seconds_per_micro_batch(run: Run) -> float:
    ends = _updates(run)
    return (ends[-1][0] - ends[0][0]) / (ends[-1][1] - ends[0][1]) if len(ends) > 1 else 0.0


def _svg(figure: Figure) -> str:
    """The `<svg>` element alone, without the XML prologue that HTML does not take."""
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
