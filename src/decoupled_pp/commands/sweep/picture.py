"""The picture of a sweep: what each variant costs a stage, against what it costs in quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decoupled_pp.run.plots import STYLE


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw every variant's difference to the reference against its critic's share of a stage's time, as a PNG.

    Args:
        found: From `figures`. Of classifiers the difference is in points of accuracy, else in percent of the loss.
        path: The PNG file.
    """
    rows, reference = found["variants"], found["reference"]
    key = "accuracy_change" if any(row["accuracy_change"] for row in rows.values()) else "loss_change"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color="#333333", linewidth=0.8)
        axes.annotate(reference, (0, 0), textcoords="offset points", xytext=(4, 4))
        for name, row in rows.items():
            change = row[key]
            if name == reference or change is None:
                continue
            below, above = change["median"] - change["min"], change["max"] - change["median"]
            point = (100 * row["critic_share"], change["median"])
            axes.errorbar(*point, yerr=[[below], [above]], fmt="o", color="#0072b2", elinewidth=0.8, capsize=2)
            axes.annotate(name, point, textcoords="offset points", xytext=(6, -3), fontsize=8)
        unit = "accuracy, points" if key == "accuracy_change" else "held-out loss, %"
        axes.set_ylabel(f"{unit}, against {reference}")
        axes.set_xlabel("critic's share of the time of the stage where it is largest, %")
        axes.set_xlim(left=-1)
        axes.margins(x=0.15)
        axes.grid(alpha=0.25, linewidth=0.6)
        FigureCanvasAgg(figure).print_figure(path, dpi=130)
