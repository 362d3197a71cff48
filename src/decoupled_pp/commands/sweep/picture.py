"""Draws a sweep: what each variant costs a stage, against what it costs in quality."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from decoupled_pp.commands.drawing import save_png
from decoupled_pp.commands.sweep.figures import SweepFigures
from decoupled_pp.run.plots import STYLE


def draw(found: SweepFigures, path: Path) -> None:
    """Draws every variant's difference to the reference against its critic's share of a stage's time, as a PNG.

    For classifiers the difference is in points of accuracy, else in percent of the loss.
    """
    by_accuracy = any(row.accuracy_change for row in found.variants.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.annotate(found.reference, (0, 0), textcoords="offset points", xytext=(4, 4))
        for name, row in found.variants.items():
            change = row.accuracy_change if by_accuracy else row.loss_change
            if name == found.reference or change is None:
                continue
            bars = [[change.median - change.low], [change.high - change.median]]
            point = (100 * row.critic_share, change.median)
            axes.errorbar(*point, yerr=bars, fmt="o", color="#0072b2", elinewidth=0.8, capsize=2)
            axes.annotate(name, point, textcoords="offset points", xytext=(6, -3), fontsize=8)
        unit = "accuracy, points" if by_accuracy else "held-out loss, %"
        axes.set_ylabel(f"{unit}, against {found.reference}")
        axes.set_xlabel("critic's share of the time of the stage where it is largest, %")
        axes.set_xlim(left=-1)
        axes.margins(x=0.15)
        axes.grid(alpha=0.25, linewidth=0.6)
        save_png(figure, path, dpi=130)
