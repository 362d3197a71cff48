"""Colours of pictures, and how pictures are saved. No torch."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#999999", "#000000", "#f0e442")
"""Colours of Okabe and Ito (2008), which colour-blind readers can tell apart."""

MARKERS = ("o", "v", "s", "^", "P", "D", "X", "*", "h")
"""Marker of each colour, for readers who see none."""


def save_png(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # a canvas of its own, not pyplot's: no global state, no display needed
    figure.savefig(path, dpi=dpi, format="png", facecolor="white")
