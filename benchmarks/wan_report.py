"""Figures, text and picture of `dpp bench wan`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import schedule
from decoupled_pp.commands.drawing import COLOURS, MARKERS, save_png

_TABLES = (
    ("share_of_zero_latency", "Share of its own rate without latency"),
    ("share_of_ideal", "Share of ideal"),
    ("measured_to_predicted", "Measured period over the planner's prediction"),
)


@dataclass
class Condition:
    """One link, and the measurements over it.

    Attributes:
        mbit: Limit of each direction, Mbit/s; 0: none.
        round_trip_ms: Round trip that was asked for.
        pings: Round trips as measured on the idle link, ms.
        stream_mbit: Rate of one TCP stream, Mbit/s, or None if it was not measured here.
        repeats: Strategy -> figures of every repeat (see `schedule_measure.figures_of`).
        refused: Strategy -> why it was not measured.
    """

    mbit: float
    round_trip_ms: float
    pings: list[float] = field(default_factory=list)
    stream_mbit: float | None = None
    repeats: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Names the link."""
        return f"round trip {self.round_trip_ms:g} ms, {_limit(self.mbit)}"

    def progress(self) -> str:
        """Returns the newest repeat in one line."""
        periods = [f"{kind} {repeats[-1]['period_ms']:.1f}" for kind, repeats in self.repeats.items()]
        new = self.stream_mbit is not None and all(len(repeats) == 1 for repeats in self.repeats.values())
        stream = f", one TCP stream {self.stream_mbit:.0f} Mbit/s" if new else ""
        return f"{self} (ping {statistics.median(self.pings):.2f} ms{stream}): {', '.join(periods)} ms/micro-batch"


def _limit(mbit: float) -> str:
    return f"{mbit:g} Mbit/s" if mbit else "no limit"


def headline(chosen: argparse.Namespace, packet_bytes: int, capacity: float) -> str:
    """Returns what is going to be measured, and whether the link's capacity can hide the round trip."""
    period = chosen.forward_ms + chosen.backward_ms
    verdict = "covers it" if chosen.capacity >= capacity else "does NOT cover it: the round trip will show"
    return (
        f"2 ranks on 2 hosts, {chosen.forward_ms:g} + {chosen.backward_ms:g} ms of emulated compute, packets of "
        f"{packet_bytes / 1000:.0f} kB: {packet_bytes * 8 / 1000 / period:.1f} Mbit/s at full rate\n"
        f"link capacity {chosen.capacity}: 1 + (round trip + transfer) / period = {capacity:.2f}, so it {verdict}"
    )


def summarize(conditions: Sequence[Condition], chosen: argparse.Namespace, command: str) -> dict[str, Any]:
    """Returns the arguments, the raw figures of every condition, and medians with their spread.

    `share_of_zero_latency` pairs every repeat with the same repeat at round trip 0 and the same limit.
    """
    arguments = {key: value for key, value in vars(chosen).items() if key not in ("run", "output")}
    without_latency = {one.mbit: one for one in conditions if one.round_trip_ms == 0}
    return {
        "command": command,
        "arguments": arguments,
        "conditions": [_figures(one, without_latency[one.mbit]) for one in conditions],
    }


def _figures(condition: Condition, base: Condition) -> dict[str, Any]:
    repeats = {}
    for kind, ones in condition.repeats.items():
        repeats[kind] = [
            {**one, "share_of_zero_latency": without["period_ms"] / one["period_ms"]}
            for one, without in zip(ones, base.repeats[kind], strict=True)
        ]
    return {
        "mbit": condition.mbit,
        "round_trip_ms": condition.round_trip_ms,
        "ping_ms": schedule.spread(condition.pings),
        "stream_mbit": condition.stream_mbit,
        "refused": condition.refused,
        "summary": {kind: schedule.spreads(ones) for kind, ones in repeats.items()},
        "repeats": repeats,
    }


def describe(figures: Mapping[str, Any], chosen: argparse.Namespace) -> str:
    """Returns the tables of shares, and what was refused."""
    text = ""
    refused: dict[str, str] = {}
    for one in figures["conditions"]:
        refused.update(one["refused"])
    for kind, reason in refused.items():
        text += f"{kind}: not measured: {reason}\n"
    for key, title in _TABLES:
        text += f"\n{title}, median (min .. max) of {chosen.repeats} interleaved repeats\n\n"
        text += _table(figures, key, chosen.strategies)
    return text


def _table(figures: Mapping[str, Any], key: str, kinds: Sequence[str]) -> str:
    """Returns a Markdown table, one row per condition."""
    text = f"| limit | round trip, ms | ping, ms | {' | '.join(kinds)} |\n|{' --- |' * (3 + len(kinds))}\n"
    for one in figures["conditions"]:
        summary = one["summary"]
        cells = [_cell(summary[kind][key]) if kind in summary else "refused" for kind in kinds]
        start = f"| {_limit(one['mbit'])} | {one['round_trip_ms']:g} | {one['ping_ms']['median']:.2f} |"
        text += f"{start} {' | '.join(cells)} |\n"
    return text


def _cell(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f} .. {values['max']:.3f})"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draws the share of the rate without latency against the round trip, a panel per limit, as a PNG."""
    limits = sorted({one["mbit"] for one in figures["conditions"]})
    with matplotlib.rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(limits) + 1.2, 3.8), layout="constrained")
        panels = figure.subplots(1, len(limits), sharey=True, squeeze=False)[0]
        for panel, mbit in zip(panels, limits, strict=True):
            conditions = [one for one in figures["conditions"] if one["mbit"] == mbit]
            _draw_panel(panel, conditions, figures["arguments"]["strategies"])
            panel.set_title(_limit(mbit), loc="left")
        panels[0].set_ylabel("share of its own rate without latency")
        if panels[-1].get_legend_handles_labels()[0]:
            panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        save_png(figure, path)


def _draw_panel(panel: Axes, conditions: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    trips = [one["round_trip_ms"] for one in conditions]
    for kind, colour, marker in zip(kinds, COLOURS, MARKERS, strict=False):
        if any(kind not in one["summary"] for one in conditions):
            continue
        shares = [one["summary"][kind]["share_of_zero_latency"] for one in conditions]
        below = [share["median"] - share["min"] for share in shares]
        above = [share["max"] - share["median"] for share in shares]
        medians = [share["median"] for share in shares]
        panel.errorbar(trips, medians, yerr=[below, above], color=colour, marker=marker, capsize=2.5, label=kind)
    panel.set_xscale("symlog", linthresh=1.0)
    panel.set_xticks(trips, [f"{trip:g}" for trip in trips])
    panel.minorticks_off()
    panel.set_xlim(-0.2, 1.3 * max(trips[-1], 1.0))
    panel.set_ylim(bottom=0.0)
    panel.set_xlabel("round trip, ms")
