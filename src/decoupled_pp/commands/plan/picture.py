"""Draws scaling curves, and the stages of a cut. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from decoupled_pp.commands.drawing import COLOURS, save_png
from decoupled_pp.commands.plan.costs import StageCosts
from decoupled_pp.commands.plan.scaling import Point


def plot_curves(curves: Mapping[str, Sequence[Point | str]], title: str, path: Path) -> None:
    """Draws tokens per second and efficiency against the number of devices, as a PNG; no line without a point."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    rate, share = figure.subplots(1, 2)
    drawn: list[Point] = []
    for (kind, points), colour in zip(curves.items(), COLOURS, strict=False):
        there = [one for one in points if not isinstance(one, str)]
        if not there:
            continue
        drawn += there
        devices = [one.devices for one in there]
        width = 2.4 if kind == "decoupled" else 1.3
        for axes, name in ((rate, "tokens_per_second"), (share, "efficiency")):
            values = [getattr(one, name) for one in there]
            axes.plot(devices, values, label=kind, color=colour, marker="o", markersize=4.0, linewidth=width)
    ticks = sorted({one.devices for one in drawn})
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
    figure.legend(*rate.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    save_png(figure, path)


def plot_cut(stages: Sequence[StageCosts], path: Path) -> None:
    """Draws the time and the memory of every stage of a cut, as a PNG."""
    figure = Figure(figsize=(11.0, 1.6 + 0.5 * len(stages)), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{index}: {stage.span}" for index, stage in enumerate(stages)]
    times = {kind: [1e3 * getattr(one, kind) for one in stages] for kind in ("forward", "backward", "critic", "step")}
    sizes = {
        "states": [one.memory / 2**20 for one in stages],
        "activations": [(one.saved + one.critic_saved) / 2**20 for one in stages],
    }
    _draw_bars(left, names, times, COLOURS[1:])
    left.set_xlabel("ms per micro-batch")
    _draw_bars(right, names, sizes, COLOURS)
    right.set_xlabel("MiB")
    right.set_yticks([])
    save_png(figure, path)


def _draw_bars(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Draws one bar per name, of the parts one after the other."""
    begins = [0.0] * len(names)
    for (kind, lengths), colour in zip(parts.items(), colours, strict=False):
        axes.barh(names, lengths, left=begins, height=0.62, label=kind, color=colour)
        begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)
