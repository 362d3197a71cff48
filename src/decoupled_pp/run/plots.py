"""Draws the figures of a run: who did what when, and the loss of every exit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from decoupled_pp.core.reports import Record, Span, TrainRecord, ValidationRecord

_Points: TypeAlias = "list[tuple[float, float]]"

WINDOW_PACKETS = 9
"""Packets that the timeline shows."""


class _Look(NamedTuple):
    """Appearance of the boxes of one phase."""

    label: str
    face: str
    hatch: str = ""
    edge: str = "white"


LOOKS = {
    "wait_in": _Look("waits for a packet", "#f4f4f4", "////", "#b5b5b5"),
    "forward": _Look("forward", "#0072b2"),
    "wait_out": _Look("waits for room", "#f4f4f4", "....", "#9a9a9a"),
    "critic": _Look("critic (last stage: loss)", "#f0e442"),
    "backward": _Look("backward", "#009e73"),
    "step": _Look("optimizer step", "#d55e00"),
    "evaluate": _Look("held-out evaluation", "#cc79a7"),
    "save": _Look("checkpoint", "#333333"),
}
"""Phase -> how it looks; colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
}
_HELD_OUT: dict[str, Any] = {"linewidth": 1.7, "marker": "o", "markersize": 5.5, "markeredgecolor": "white"}
_WIDTH = 11.0
_NUMBER_SIZE = 7.5


def plot_timeline(spans_by_stage: Mapping[int, Sequence[Span]], path: Path) -> None:
    """Draw what every stage does during a few packets from the middle of the recording, as a PNG.

    The window lies where all stages were recorded, so that an empty place in a row is time outside every phase, not
    missing data. (Stages never recorded at the same time are drawn over the whole recording.) "Working" is the share
    of the window that a stage spends in phases other than the two waits.
    """
    rows = {stage: spans for stage, spans in sorted(spans_by_stage.items()) if spans}
    with _picture(path, _WIDTH, 1.35 + 0.45 * max(2, len(rows))) as (figure, axes):
        if not rows:
            _say_empty(axes, "no spans recorded")
            return
        start, end = _window(rows)
        axes.set_xlim(0, (end - start) * 1e3)
        for position, spans in enumerate(rows.values()):
            draw_row(axes, position, spans, start, end)
        labels = [f"stage {stage}\n{_working(spans, start, end):.0%} working" for stage, spans in rows.items()]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds")
        axes.set_title("What every stage does, packet by packet (numbers: packets in forward)")
        add_legend(figure, [span for spans in rows.values() for span in spans])


def add_legend(figure: Figure, spans: Iterable[Span]) -> None:
    """Add a legend of the phases of these spans below a figure."""
    seen = {span.phase for span in spans}
    looks = [look for phase, look in LOOKS.items() if phase in seen]
    handles = [Patch(fc=look.face, ec=look.edge, hatch=look.hatch, label=look.label) for look in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), 6)), frameon=False)


def plot_losses(records: Sequence[Record], path: Path, unit: str) -> None:
    """Draw the training and held-out loss of every exit against the samples trained on, as a PNG.

    Nothing is smoothed: a training point is the mean since the record before it, drawn where that interval ends.
    """
    train = _curves(records, TrainRecord)
    held_out = _curves(records, ValidationRecord)
    exits = sorted({*train, *held_out})
    with _picture(path, 9.0, 5.0) as (_, axes):
        if not exits:
            _say_empty(axes, "no losses recorded")
            return
        for stage in exits:
            _draw_exit(axes, train[stage], held_out[stage], stage, 1 + exits[-1])
        points = chain(*train.values(), *held_out.values())
        _label_losses(axes, [loss for _, loss in points], unit)


def plot_exits(exits: Sequence[tuple[float, float]], early: Sequence[tuple[float, float, float]], path: Path) -> None:
    """Draw held-out accuracy against the cost of a sample, as a PNG.

    Exits are (FLOPs, accuracy), the whole network last; `early` has (mean FLOPs, accuracy, confidence to leave at).
    """
    with _picture(path, 7.5, 4.6) as (_, axes):
        if not exits:
            _say_empty(axes, "no accuracy to draw")
            return
        points = [(x, 100 * y) for x, y in exits]
        axes.plot(*_columns(points), color="#0072b2", label="one exit for all samples", **_HELD_OUT)
        for number, point in enumerate(points):
            axes.annotate(f"exit {number}", point, textcoords="offset points", xytext=(7, -11))
        if early:
            row = sorted((x, 100 * y, threshold) for x, y, threshold in early)
            axes.plot(*_columns([(x, y) for x, y, _ in row]), color="#d55e00", label="early exit", **_HELD_OUT)
            for x, y, threshold in row:
                axes.annotate(f"> {threshold:g}", (x, y), textcoords="offset points", xytext=(7, 6))
        axes.set_xlim(left=0)
        axes.margins(0.08, 0.12)
        axes.set_xlabel("FLOPs per sample, forward")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel("held-out accuracy, %")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def _curves(records: Iterable[Record], kind: type[TrainRecord | ValidationRecord]) -> defaultdict[int, _Points]:
    """Returns stage -> (samples, loss) of the records of a kind whose loss can be drawn."""
    curves: defaultdict[int, _Points] = defaultdict(list)
    for record in records:
        if isinstance(record, kind) and record.loss is not None and math.isfinite(record.loss):
            curves[record.stage].append((record.samples, record.loss))
    return curves


def _window(rows: Mapping[int, Sequence[Span]]) -> tuple[float, float]:
    """Returns start and end of the time to show: `WINDOW_PACKETS` packets in the middle of what all stages share."""
    starts = [min(span.start for span in spans) for spans in rows.values()]
    ends = [max(span.end for span in spans) for spans in rows.values()]
    first, last = max(starts), min(ends)
    if last <= first:
        return min(starts), max(ends) + 1e-9
    # The busiest row has a forward per packet; the mean over the shared time is the pace of the pipeline.
    begun = [[span for span in spans if first <= span.start < last] for spans in rows.values()]
    forwards = max(sum(span.phase == "forward" for span in spans) for spans in begun)
    width = min(last - first, (last - first) * WINDOW_PACKETS / max(1, forwards))
    middle = (first + last) / 2
    return middle - width / 2, middle + width / 2


def draw_row(axes: Axes, position: int, spans: Sequence[Span], start: float, end: float) -> None:
    """Draw the spans of one rank between two times as boxes, in milliseconds since `start`, on the row `position`."""
    for phase, look in LOOKS.items():
        boxes = [_clip(span, start, end) for span in spans if span.phase == phase]
        visible = [(left, width) for left, width in boxes if width > 0]
        axes.broken_barh(
            visible, (position - 0.36, 0.72), facecolor=look.face, edgecolor=look.edge, hatch=look.hatch, linewidth=0.4
        )
    milliseconds_per_inch = (end - start) * 1e3 / (_WIDTH - 1.1)
    for span in spans:
        left, width = _clip(span, start, end)
        number = str(span.packet)
        # A digit is about 0.7 of the font size wide, and 72 points are one inch.
        number_inches = len(number) * 0.7 * _NUMBER_SIZE / 72
        if span.phase == "forward" and width > number_inches * milliseconds_per_inch:
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white", "fontsize": _NUMBER_SIZE}
            axes.text(left + width / 2, position, number, **style)


def _working(spans: Sequence[Span], start: float, end: float) -> float:
    """Returns the share of the window in which a stage does not wait."""
    widths = (_clip(span, start, end)[1] for span in spans if not span.phase.startswith("wait"))
    return sum(width for width in widths if width > 0) / ((end - start) * 1e3)


def _clip(span: Span, start: float, end: float) -> tuple[float, float]:
    """Returns (left, width) of a span inside the window, in milliseconds since its start; width <= 0 if outside."""
    left = max(span.start, start)
    right = min(span.end, end)
    return (left - start) * 1e3, (right - left) * 1e3


def _draw_exit(axes: Axes, train: _Points, held_out: _Points, stage: int, stages: int) -> None:
    colour = _colour(stage, stages)
    axes.plot(*_columns(train), color=colour, linewidth=0.7, alpha=0.6)
    role = "network's own head" if stage == stages - 1 else "critic"
    label = f"exit {stage} ({role})"
    if held_out:
        label += f", last held-out {held_out[-1][1]:#.4g}"
    axes.plot(*_columns(held_out), color=colour, label=label, zorder=3, **_HELD_OUT)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _colour(stage: int, stages: int) -> str:
    """Returns the colour of an exit: from light to dark with depth; the network's own head stands out."""
    if stage == stages - 1:
        return "#d55e00"
    share = stage / (stages - 2) if stages > 2 else 0.5
    return matplotlib.colors.to_hex(matplotlib.colormaps["viridis_r"](0.2 + 0.75 * share))


def _label_losses(axes: Axes, losses: Sequence[float], unit: str) -> None:
    logarithmic = min(losses) > 0 and max(losses) / min(losses) > 20
    if logarithmic:
        axes.set_yscale("log")
    scale = ", log scale" if logarithmic else ""
    axes.set_ylabel(f"loss ({unit}{scale})")
    axes.set_xlabel("samples trained on")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_title("Loss of every exit (thin: training, mean between two points; thick: held-out)")
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none")


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Give the block a figure of so many inches to draw on, and save it as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()
        # A canvas of its own instead of pyplot: no global state, no figure kept alive, no display needed.
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=150, format="png", facecolor="white")
