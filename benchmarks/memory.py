"""`dpp bench memory`: activations that every rank of a pipeline holds for backward, against ranks and micro-batches."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.schedule import STRATEGIES
from decoupled_pp.commands.arguments import numbers_of, strategies_of
from decoupled_pp.commands.drawing import COLOURS, MARKERS, save_png
from decoupled_pp.core import environment

_PER_RANK = (1, 2, 4)
"""Micro-batches of a step, as multiples of the ranks."""

_KIB = 1024
_LINES = ("-", "--", ":", "-.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dpp bench memory`."""
    parser.add_argument("--output", required=True, help="folder for memory.json, memory.md and memory.png")
    parser.add_argument("--ranks", default="2,4,8", help="comma-separated numbers of processes")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated; the default is all")
    parser.set_defaults(run=run_command)


def run_command(chosen: argparse.Namespace) -> int:
    """Starts one number of ranks after the other and reports, or is one of the ranks."""
    sizes = [int(number) for number in numbers_of("--ranks", chosen.ranks, 2, "2,4,8", whole=True)]
    strategies = strategies_of(chosen.strategies, STRATEGIES)
    from benchmarks.memory_measure import BLOCKS, GptSize, measure
    from decoupled_pp.commands.launcher import launch

    folder = Path(chosen.output)
    if environment.world_size() > 1:
        measured = measure(strategies, _PER_RANK, GptSize())
        if environment.rank() == 0:
            _write(_part(folder, environment.world_size()), measured)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for ranks in sizes:
        if code := launch(sys.argv[1:], ranks, max_restarts=0, grace_seconds=10):
            return code
        part = _part(folder, ranks)
        results += json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    arguments = {"ranks": chosen.ranks, "per_rank": _PER_RANK, "strategies": strategies, **asdict(GptSize())}
    _write(folder / "memory.json", {"arguments": arguments, "blocks_per_rank": BLOCKS, "measurements": results})
    text = table(results, strategies)
    (folder / "memory.md").write_text(text, encoding="utf-8")
    draw(results, strategies, folder / "memory.png")
    sys.stdout.write(text)
    return 0


def _part(folder: Path, ranks: int) -> Path:
    """Returns the file in which rank 0 hands over what was measured on so many ranks."""
    return folder / f"ranks-{ranks}.json"


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(results: Sequence[dict[str, Any]], strategies: Sequence[str]) -> str:
    """Returns Markdown: the fullest rank for every number of ranks and of micro-batches, and what was refused."""
    text = "Saved activations of the fullest rank, KiB\n\n"
    text += f"| ranks | micro-batches | {' | '.join(strategies)} |\n" + "| --- " * (2 + len(strategies)) + "|\n"
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for one in results:
        cell = f"{max(one['bytes']) / _KIB:.0f}" if "bytes" in one else "refused"
        rows.setdefault((one["ranks"], one["micro_batches"]), {})[one["strategy"]] = cell
    for (ranks, count), cells in rows.items():
        text += f"| {ranks} | {count} | {' | '.join(cells[kind] for kind in strategies)} |\n"
    refused = {one["strategy"]: one["refused"] for one in results if "refused" in one}
    return text + "".join(f"\n{kind}: not measured: {reason}\n" for kind, reason in refused.items())


def draw(results: Sequence[dict[str, Any]], strategies: Sequence[str], path: Path) -> None:
    """Draws the fullest rank against ranks with as many micro-batches, and against micro-batches, as a PNG."""
    measured = [one for one in results if "bytes" in one]
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max((one["ranks"] for one in results), default=0)
    fewest = [one for one in measured if one["micro_batches"] == _PER_RANK[0] * one["ranks"]]
    _draw_panel(left, fewest, strategies, "ranks", "Against ranks (fewest micro-batches of each)")
    on_most = [one for one in measured if one["ranks"] == most]
    _draw_panel(right, on_most, strategies, "micro_batches", f"On {most} ranks")
    left.set_ylabel("saved activations of the fullest rank, KiB")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    save_png(figure, path)


def _draw_panel(axes: Axes, results: Sequence[dict[str, Any]], strategies: Sequence[str], key: str, title: str) -> None:
    for place, kind in enumerate(strategies):
        points = sorted((one[key], max(one["bytes"]) / _KIB) for one in results if one["strategy"] == kind)
        # Some curves lie on top of each other: a later one has smaller markers, and gaps in its line.
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[place],
            marker=MARKERS[place],
            markersize=max(4.0, 11.0 - 1.3 * place),
            linestyle=_LINES[place % len(_LINES)],
            label=kind,
        )
    ticks = sorted({one[key] for one in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(key.replace("_", "-") + ("" if key == "ranks" else " per step"))
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
