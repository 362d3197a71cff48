"""Draws scaling curves (tokens per second and efficiency against devices), and a cut, stage by stage. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from decoupled_pp.commands.plan.scaling import Point
from decoupled_pp.commands.plan.stages import CutStage

_COLOURS = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#999999", "#000000", "#f0e442")
"""Okabe and Ito (2008); the first is decoupled's."""


def plot_curves(curves: Mapping[str, Sequence[Point | str]], title: str, path: Path) -> None:
    """Draw a curve for every strategy, as a PNG; where one cannot run it has no point, and it is left out without any.

    Args:
        curves: Strategy -> a point per number of devices, or why there is none.
        title: Above the picture.
        path: The PNG file.
    """
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    rate, share = figure.subplots(1, 2)
    for (kind, points), colour in zip(curves.items(), _COLOURS, strict=False):
        there = [one for one in points if not isinstance(one, str)]
        if not there:
            continue
        devices = [one.devices for one in there]
        look: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "markersize": 4.0,
            "linewidth": 2.4 if kind == "decoupled" else 1.3,
        }
        rate.plot(devices, [one.tokens_per_second for one in there], label=kind, **look)
        share.plot(devices, [one.efficiency for one in there], **look)
    ticks = sorted({one.devices for points in curves.values() for one in points if not isinstance(one, str)})
    for axes, name in ((rate, "tokens/s"), (share, "efficiency (critics are no useful work)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("devices")
        axes.set_ylabel(name)
        axes.grid(alpha=0.25, linewidth=0.6)
    rate.set_yscale("log")
    rate.yaxis.set_major_formatter(EngFormatter(sep=""))
    share.set_ylim(0, 1.02)
    figure.suptitle(f"Predicted, not measured: {title}", fontsize=10.5)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def plot_cut(stages: Sequence[CutStage], path: Path) -> None:
    """Draw the time and the memory of every stage of a cut, as a PNG.

    Args:
        stages: In order.
        path: The PNG file.
    """
    figure = Figure(figsize=(11.0, 1.6 + 0.5 * len(stages)), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{k}: {s.layers[0]}" + (f"..{s.layers[1]}" if s.count > 1 else "") for k, s in enumerate(stages)]
    times = {kind: [1e3 * getattr(one, kind) for one in stages] for kind in ("forward", "backward", "critic", "step")}
    sizes = {kind: [getattr(one, kind) / 2**20 for one in stages] for kind in ("states", "activations")}
    for axes, rows, unit in ((left, times, "ms per micro-batch"), (right, sizes, "MiB")):
        begin = [0.0] * len(stages)
        for (kind, row), colour in zip(rows.items(), _COLOURS if axes is right else _COLOURS[1:], strict=False):
            axes.barh(names, row, left=begin, height=0.62, label=kind, color=colour)
            begin = [start + more for start, more in zip(begin, row, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)
    right.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, format="png", facecolor="white")
