"""Plots of measured series, drawn without a screen and the same on every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One series; the axis it is measured on stands at its side of the panel."""

    label: str  # with its unit
    values: Sequence[float]


class Panel(NamedTuple):
    """Two series over the same x, both axes of each in powers of ten."""

    title: str
    x_label: str
    x: Sequence[float]
    left: Line
    right: Line


def draw(path: Path, panels: Sequence[Panel], columns: int) -> None:
    """Write the panels, `columns` in a row, as one SVG."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot, which would look for a screen
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // columns)
    with plt.rc_context({"font.size": 9, "svg.hashsalt": path.stem}):
        figure, places = plt.subplots(
            rows, columns, figsize=(5.2 * columns, 3.4 * rows), layout="constrained", squeeze=False
        )
        for axes, panel in zip(places.flat, panels, strict=True):
            for side, line, colour in (
                (axes, panel.left, "tab:blue"),
                (axes.twinx(), panel.right, "tab:red"),
            ):
                side.loglog(panel.x, line.values, "o-", color=colour, linewidth=1, markersize=4)
                side.set_ylabel(line.label, color=colour)
                # A flat series shall look flat, not fill the panel with its noise.
                side.set_ylim(min(line.values) / 3, max(line.values) * 3)
            axes.set(title=panel.title, xlabel=panel.x_label)
            axes.set_xticks(panel.x, [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in panel.x])
            axes.minorticks_off()
            axes.grid(alpha=0.15)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
