"""Draws scaling curves: tokens per second and efficiency against devices. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from decoupled_pp.planner.scaling import Point

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
