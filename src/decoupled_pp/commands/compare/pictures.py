"""Draws a comparison as SVG: timelines on one scale, quality against samples and time, speed, memory.

The caller sets matplotlib's style, which counts until a figure is saved, not only while it is made.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from decoupled_pp.commands.compare.contenders import Contender
from decoupled_pp.commands.compare.figures import ContenderFigures
from decoupled_pp.commands.compare.runs import Run
from decoupled_pp.commands.spread import Column, Spread, loss_or_infinity
from decoupled_pp.core.reports import Span
from decoupled_pp.pipeline.meter import PAUSES
from decoupled_pp.run.plots import add_legend, draw_row

FLUSHES = 2
"""Flushes of the slowest pipeline that the timelines show."""

_WIDTH = 11.0


def timelines(runs: Sequence[Run], micro_batches: int) -> str:
    """Draws one panel per contender, all over the same length of time, each from an update of its last rank on."""
    firsts = [run for run in runs if run.repeat == 0 and any(run.spans.values())]
    width = max((_seconds_per_micro_batch(run) for run in firsts), default=0.0) * micro_batches * FLUSHES
    rows = sum(len(run.spans) for run in firsts)
    heights = [len(run.spans) + 0.6 for run in firsts]
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.34 * rows + 0.42 * len(firsts)), layout="constrained")
    panels = figure.subplots(max(1, len(firsts)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for axes, run in zip(panels, firsts, strict=False):
        _timeline(axes, run, width)
    for axes in panels[:-1]:
        axes.set_xticklabels([])
    panels[-1].set_xlabel("milliseconds, the same scale for all; numbers: micro-batches in forward")
    shown = [span for run in firsts for span in chain(*run.spans.values()) if span.phase not in PAUSES]
    add_legend(figure, shown)
    return _svg(figure)


def _timeline(axes: Axes, run: Run, width: float) -> None:
    """Draws one panel, `width` seconds wide."""
    start = _start(run, width)
    ranks = sorted(run.spans)
    for position, rank in enumerate(ranks):
        draw_row(axes, position, run.spans[rank], start, start + width)
    axes.set_xlim(0, width * 1e3)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(run.contender.name)


def quality(runs: Sequence[Run], contenders: Sequence[Contender], target: float | None) -> str:
    """Draws the held-out loss of every run against samples seen, and against training time."""
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    by_samples, by_time = figure.subplots(1, 2, sharey=True)
    for number, contender in enumerate(contenders):
        for run in (one for one in runs if one.contender.name == contender.name):
            style = _line(number, run)
            losses = [loss_or_infinity(record.loss) for record in run.validations]  # infinity is not drawn
            by_samples.plot([record.samples for record in run.validations], losses, **style)
            by_time.plot([record.training_seconds for record in run.validations], losses, **style)
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


def bars(rows: Mapping[str, ContenderFigures], column: Column, suffix: str = "") -> str:
    """Draws a bar per contender: the median, and a line from the least to the greatest of the repeats."""
    spreads = {name: column.read(row) for name, row in rows.items()}
    known = {name: spread for name, spread in spreads.items() if isinstance(spread, Spread)}
    figure = Figure(figsize=(_WIDTH / 2, 0.8 + 0.32 * max(1, len(known))), layout="constrained")
    axes: Axes = figure.add_subplot()
    for position, (name, spread) in enumerate(known.items()):
        colour = f"C{list(spreads).index(name)}"  # a contender keeps its colour if one before it has no bar
        axes.barh(position, spread.median, color=colour, height=0.6)
        axes.plot([spread.low, spread.high], [position, position], color="black", linewidth=1.2)
        label = f" {column.cell(rows[name])[0]}{suffix}"
        axes.text(max(spread.high, spread.median), position, label, va="center", fontsize=8)
    axes.set_yticks(range(len(known)), list(known))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(column.title)
    return _svg(figure)


def _line(number: int, run: Run) -> dict[str, Any]:
    """Returns how the curve of a run looks; dashed is a contender at its strategy's second pace of updates."""
    style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1.3, "alpha": 0.85, "marker": "."}
    if run.repeat == 0:  # one entry in the legend for all repeats
        style["label"] = run.contender.name
    if run.contender.name != run.contender.strategy:
        style["linestyle"] = "--"
    return style


def _updates(run: Run) -> list[Span]:
    """Returns the optimizer steps of the last rank that recorded some."""
    for rank in sorted(run.spans, reverse=True):
        steps = [span for span in run.spans[rank] if span.phase == "step"]
        if steps:
            return steps
    return []


def _start(run: Run, width: float) -> float:
    """Returns the end of an update, if possible one that no evaluation or checkpoint follows within `width` seconds."""
    ends = [span.end for span in _updates(run)] or [0.0]
    pauses = [span for span in chain(*run.spans.values()) if span.phase in PAUSES]
    free = [
        end
        for end in ends
        if end + width <= ends[-1] and not any(pause.start < end + width and pause.end > end for pause in pauses)
    ]
    return free[len(free) // 2] if free else ends[len(ends) // 3]


def _seconds_per_micro_batch(run: Run) -> float:
    updates = _updates(run)
    if len(updates) < 2:
        return 0.0
    first, last = updates[0], updates[-1]
    return (last.end - first.end) / (last.packet - first.packet)


def _svg(figure: Figure) -> str:
    """Returns the `<svg>` element alone, without the XML prologue that HTML does not take."""
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
