"""Table and figure of `dpp bench memory`: saved activations of the fullest rank, against ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

KIB = 1024
_LOOKS = (
    ("#d55e00", "o"), ("#0072b2", "s"), ("#009e73", "^"), ("#cc79a7", "v"), ("#e69f00", "D"), ("#56b4e9", "P"),
    ("#333333", "X"),
)  # fmt: skip
"""Colour and marker of the strategies in turn; colours of Okabe and Ito (2008)."""


def table(results: Sequence[dict[str, Any]], strategies: Sequence[str]) -> str:
    """Markdown: a row per number of ranks and of micro-batches, KiB of the fullest rank; below, what was refused."""
    head = "| ranks | micro-batches | " + " | ".join(strategies) + " |\n"
    text = "Saved activations of the fullest rank, KiB\n\n" + head + "| --- " * (2 + len(strategies)) + "|\n"
    for ranks, count in dict.fromkeys((one["ranks"], one["micro_batches"]) for one in results):
        cells = {
            one["strategy"]: _cell(one) for one in results if (one["ranks"], one["micro_batches"]) == (ranks, count)
        }
        text += f"| {ranks} | {count} | " + " | ".join(cells[kind] for kind in strategies) + " |\n"
    refused = {one["strategy"]: one["refused"] for one in results if "refused" in one}
    return text + "".join(f"\n{kind}: not measured: {reason}\n" for kind, reason in refused.items())


def draw(results: Sequence[dict[str, Any]], strategies: Sequence[str], path: Path) -> None:
    """Two panels, as a PNG: against ranks with as many micro-batches, and against micro-batches on the most ranks."""
    measured = [one for one in results if "bytes" in one]
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max((one["ranks"] for one in results), default=0)
    fewest = {
        r: min(one["micro_batches"] for one in results if one["ranks"] == r) for r in {o["ranks"] for o in results}
    }
    alike = [one for one in measured if one["micro_batches"] == fewest[one["ranks"]]]
    _panel(left, alike, strategies, "ranks", "Against ranks (fewest micro-batches of each)")
    _panel(right, [o for o in measured if o["ranks"] == most], strategies, "micro_batches", f"On {most} ranks")
    left.set_ylabel("saved activations of the fullest rank, KiB")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, format="png", facecolor="white")


def _cell(one: dict[str, Any]) -> str:
    return f"{max(one['bytes']) / KIB:.0f}" if "bytes" in one else "refused"


def _panel(axes: Axes, results: list[dict[str, Any]], strategies: Sequence[str], key: str, title: str) -> None:
    for place, kind in enumerate(strategies):
        points = sorted((one[key], max(one["bytes"]) / KIB) for one in results if one["strategy"] == kind)
        colour, marker = _LOOKS[place % len(_LOOKS)]
        # Some lie on top of each other: what is drawn later is smaller, and its line has gaps.
        size, style = 11.0 - 1.3 * place, ("-", "--", ":", "-.")[place % 4]
        x, y = [at for at, _ in points], [value for _, value in points]
        axes.plot(x, y, color=colour, marker=marker, markersize=max(4.0, size), linestyle=style, label=kind)
    ticks = sorted({one[key] for one in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(key.replace("_", "-") + ("" if key == "ranks" else " per step"))
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
