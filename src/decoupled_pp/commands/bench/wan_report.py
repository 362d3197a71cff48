"""What `dpp bench wan` has measured, as figures, text and one picture."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decoupled_pp.commands.bench import durations, schedule

GOAL = 0.95
"""Of its own rate without latency, for `decoupled`, at every round trip, as long as bandwidth suffices."""

_LOOKS = {
    "decoupled": ("#0072b2", "o"),
    "1f1b": ("#d55e00", "s"),
    "gpipe": ("#999999", "v"),
    "zero_bubble": ("#009e73", "^"),
    "zbv": ("#cc79a7", "D"),
    "interleaved_1f1b": ("#e69f00", "P"),
    "deepspeed": ("#000000", "X"),
}
"""Strategy -> colour (Okabe and Ito 2008) and marker."""


@dataclass
class Condition:
    """One link, and what was measured over it.

    Attributes:
        mbit: Limit of each direction, Mbit/s; 0: none.
        round_trip_ms: Asked for.
        pings: Round trips as measured, idle, ms.
        stream_mbit: Of one TCP stream, or None if that was not measured here.
        repeats: Strategy -> figures of every repeat (see `schedule.figures_of`).
        refused: Strategy -> why it was not measured.
    """

    mbit: float
    round_trip_ms: float
    pings: list[float] = field(default_factory=list)
    stream_mbit: float | None = None
    repeats: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The link, in words."""
        return f"round trip {self.round_trip_ms:g} ms, {_limit(self.mbit)}"

    def progress(self) -> str:
        """The newest repeat in one line."""
        periods = [f"{kind} {repeats[-1]['period_ms']:.1f}" for kind, repeats in self.repeats.items()]
        new = self.stream_mbit is not None and all(len(repeats) == 1 for repeats in self.repeats.values())
        stream = f", one TCP stream {self.stream_mbit:.0f} Mbit/s" if new else ""
        return f"{self} (ping {statistics.median(self.pings):.2f} ms{stream}): {', '.join(periods)} ms/micro-batch"


def _limit(mbit: float) -> str:
    return f"{mbit:g} Mbit/s" if mbit else "no limit"


def headline(chosen: argparse.Namespace, packet_bytes: int, capacity: float) -> str:
    """What is going to be measured, and whether the link's capacity and bandwidth can suffice."""
    period = chosen.forward_ms + chosen.backward_ms
    verdict = "covers it" if chosen.capacity >= capacity else "does NOT cover it: the round trip will show"
    return (
        f"2 ranks on 2 hosts, {chosen.forward_ms:g} + {chosen.backward_ms:g} ms of emulated compute, packets of "
        f"{packet_bytes / 1000:.0f} kB: {packet_bytes * 8 / 1000 / period:.1f} Mbit/s at full rate\n"
        f"link capacity {chosen.capacity}: 1 + (round trip + transfer) / period = {capacity:.2f}, so it {verdict}"
    )


def summarize(conditions: list[Condition], chosen: argparse.Namespace, command: str) -> dict[str, Any]:
    """The arguments, the raw figures of every condition, and medians with their spread.

    `share_of_zero_latency` pairs every repeat with the same repeat at round trip 0 and the same limit.
    """
    arguments = {k: v for k, v in vars(chosen).items() if k not in ("run", "output", "refused")}
    return {
        "command": command,
        "arguments": arguments,
        "conditions": [_figures(c, conditions, chosen) for c in conditions],
    }


def _figures(condition: Condition, conditions: list[Condition], chosen: argparse.Namespace) -> dict[str, Any]:
    base = next(other for other in conditions if other.mbit == condition.mbit and other.round_trip_ms == 0)
    repeats = {
        kind: [
            {**one, "share_of_zero_latency": without["period_ms"] / one["period_ms"]}
            for one, without in zip(ones, base.repeats[kind], strict=True)
        ]
        for kind, ones in condition.repeats.items()
    }
    summary = schedule.summarize(repeats, chosen)
    return {
        "mbit": condition.mbit,
        "round_trip_ms": condition.round_trip_ms,
        "ping_ms": {
            "median": statistics.median(condition.pings),
            "min": min(condition.pings),
            "max": max(condition.pings),
        },
        "stream_mbit": condition.stream_mbit,
        "refused": condition.refused,
        "summary": {kind: summary[kind] for kind in repeats},
        "repeats": repeats,
    }


def details(figures: dict[str, Any], chosen: argparse.Namespace) -> str:
    """Every condition as `dpp bench schedule` would tell it."""
    text, mean = "", durations.unevenness_of(chosen).slowest_mean
    for one in figures["conditions"]:
        text += f"\nround trip {one['round_trip_ms']:g} ms, {_limit(one['mbit'])}: "
        text += schedule.describe({**vars(chosen), "slowest_mean": mean, **one["summary"], "refused": one["refused"]})
    return text


def describe(figures: dict[str, Any], chosen: argparse.Namespace) -> str:
    """The tables of shares, what was refused, and whether the goal is reached."""
    refused = {kind: why for one in figures["conditions"] for kind, why in one["refused"].items()}
    text = "".join(f"{kind}: not measured: {why}\n" for kind, why in refused.items())
    for key, title in (
        ("share_of_zero_latency", "Share of its own rate without latency"),
        ("share_of_ideal", "Share of ideal"),
        ("measured_to_predicted", "Measured period over the planner's prediction"),
    ):
        text += (
            f"\n{title}, median (min .. max) of {chosen.repeats} interleaved repeats\n\n{_table(figures, key, chosen)}"
        )
    return text + "\n" + _verdict(figures)


def _table(figures: dict[str, Any], key: str, chosen: argparse.Namespace) -> str:
    """A Markdown table, one row per condition."""
    kinds = chosen.strategies
    text = f"| limit | round trip, ms | ping, ms | {' | '.join(kinds)} |\n|{' --- |' * (3 + len(kinds))}\n"
    for one in figures["conditions"]:
        cells = [_cell(one["summary"][kind][key]) if kind in one["summary"] else "refused" for kind in kinds]
        start = f"| {_limit(one['mbit'])} | {one['round_trip_ms']:g} | {one['ping_ms']['median']:.2f} |"
        text += f"{start} {' | '.join(cells)} |\n"
    return text


def _cell(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f} .. {values['max']:.3f})"


def _verdict(figures: dict[str, Any]) -> str:
    """Whether `decoupled` reached the goal; empty if it was not measured."""
    shares = [
        (one["summary"]["decoupled"]["share_of_zero_latency"]["median"], one)
        for one in figures["conditions"]
        if "decoupled" in one["summary"] and one["round_trip_ms"]
    ]
    if not shares:
        return ""
    worst, one = min(shares, key=lambda pair: pair[0])
    verdict = "holds" if worst >= GOAL else "is missed"
    where = f"{one['round_trip_ms']:g} ms, {_limit(one['mbit'])}"
    return f"goal: decoupled >= {GOAL:g} of its own rate without latency {verdict}: at worst {worst:.3f} ({where})\n"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Share of the rate without latency against the round trip, a panel per limit, as a PNG."""
    limits = sorted({one["mbit"] for one in figures["conditions"]})
    with matplotlib.rc_context({"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6 * len(limits) + 1.2, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(limits), sharey=True, squeeze=False)[0]
        for panel, mbit in zip(panels, limits, strict=True):
            _draw_panel(panel, [one for one in figures["conditions"] if one["mbit"] == mbit])
            panel.set_title(_limit(mbit), loc="left")
        panels[0].set_ylabel("share of its own rate without latency")
        if panels[-1].get_legend_handles_labels()[0]:
            panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)


def _draw_panel(panel: Axes, conditions: list[dict[str, Any]]) -> None:
    trips = [one["round_trip_ms"] for one in conditions]
    for kind, (colour, marker) in _LOOKS.items():
        if any(kind not in one["summary"] for one in conditions):
            continue
        shares = [one["summary"][kind]["share_of_zero_latency"] for one in conditions]
        middle = [share["median"] for share in shares]
        spread = [
            [share["median"] - share["min"] for share in shares],
            [share["max"] - share["median"] for share in shares],
        ]
        panel.errorbar(trips, middle, yerr=spread, color=colour, marker=marker, capsize=2.5, label=kind)
    panel.axhline(GOAL, color="black", linewidth=0.8, linestyle=":")
    panel.set_xscale("symlog", linthresh=1.0)
    panel.set_xticks(trips, [f"{trip:g}" for trip in trips])
    panel.minorticks_off()
    panel.set_xlim(-0.2, 1.3 * max(trips[-1], 1.0))
    panel.set_ylim(bottom=0.0)
    panel.set_xlabel("round trip, ms")
