"""Plots of what was measured: drawn without a screen, the same on every run, for light and dark pages.

Each says in its description, for those who do not see it, what numbers it shows.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minimind.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER = "#1f2328", "#ffffff"
BLUE, RED, GREY = "#0969da", "#cf222e", "#8c959f"
DARK = {INK: "#e6edf3", PAPER: "#0d1117", BLUE: "#388bfd", RED: "#ff7b72", GREY: "#6e7681"}


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
    rows = -(-len(panels) // columns)
    with sheet(path, (5.2 * columns, 3.4 * rows)) as (figure, words):
        places = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(places.flat, panels, strict=True):
            for side, line, colour in ((axes, panel.left, BLUE), (axes.twinx(), panel.right, RED)):
                side.loglog(panel.x, line.values, "o-", color=colour, linewidth=1, markersize=4)
                side.set_ylabel(line.label, color=colour)
                # A flat series shall look flat, not fill the panel with its noise.
                side.set_ylim(min(line.values) / 3, max(line.values) * 3)
            axes.set(title=panel.title, xlabel=panel.x_label)
            axes.set_xticks(panel.x, [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in panel.x])
            axes.minorticks_off()
            axes.grid(alpha=0.15)
            for line in (panel.left, panel.right):
                words.append(series(f"{panel.title}, {line.label}", panel.x, line.values))


class Curve(NamedTuple):
    """One series of a panel of curves."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    ours: bool


def draw_curves(
    path: Path, panels: dict[str, Sequence[Curve]], levels: dict[str, float], labels: tuple[str, str]
) -> None:
    """A panel of each title's curves, with a dotted line at its level; `labels` are those of x and y."""
    with sheet(path, (5 * len(panels), 3.6)) as (figure, words):
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, curves) in zip(places, panels.items(), strict=True):
            for curve in curves:
                axes.plot(curve.x, curve.y, label=curve.label, color=BLUE if curve.ours else GREY)
                words.append(series(f"{title}, {curve.label}, {labels[1]}", curve.x, curve.y))
            axes.axhline(levels[title], color=INK, linewidth=0.8, linestyle=":")
            axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
            axes.legend()


class Bar(NamedTuple):
    """A rival: how many times as fast as the peer its median round was, its slowest and its fastest."""

    label: str
    median: float
    least: float
    most: float
    ours: bool


class Group(NamedTuple):
    """Rivals at the same work."""

    title: str
    bars: Sequence[Bar]
    goal: float | None


def draw_bars(path: Path, groups: Sequence[Group], label: str) -> None:
    """Bars of all groups below each other, narrow enough for a phone, with a line at 1."""
    lines = sum(1.4 + len(group.bars) for group in groups)
    with sheet(path, (4.6, 0.19 * lines + 0.6)) as (figure, words):
        axes, place = figure.subplots(), 0.0
        places, names = [], []
        for group in groups:
            axes.text(0, place, group.title, weight="bold", va="center")
            for bar in group.bars:
                place += 1
                places.append(place)
                names.append(bar.label)
                draw_bar(axes, place, bar, group.goal if bar.ours else None)
                words.append(series(f"{group.title}, {bar.label}", ["median", "least", "most"], bar[1:4]))
            ends = [place - len(group.bars) + 0.5, place + 0.5]
            axes.plot([1, 1], ends, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            place += 1.4
        axes.set_yticks(places, names)
        axes.set_ylim(place - 0.7, -0.7)
        axes.set_xlim(left=0)
        axes.tick_params("y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.supxlabel(label, size=8)


def draw_bar(axes: Axes, place: float, bar: Bar, goal: float | None) -> None:
    axes.barh(place, bar.median, height=0.72, color=BLUE if bar.ours else GREY)
    axes.plot([bar.least, bar.most], [place, place], color=INK, linewidth=1, marker="|", markersize=4)
    value, end = f"{bar.median:.2f}×" if bar.median != 1 else "1×", max(bar.most, 1.0)
    if goal:
        axes.plot([goal, goal], [place - 0.45, place + 0.45], color=RED, linewidth=1.5)
        value, end = f"{value} (goal {goal:g}×)", max(end, goal)
    beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
    axes.annotate(value, (end, place), weight="bold" if bar.ours else "normal", **beside)


@contextmanager
def sheet(path: Path, size: tuple[float, float]) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, of a size in inches, and its description; then written as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with rc_context({"font.size": 9, "svg.hashsalt": path.stem} | dict.fromkeys(inked, INK)):
        figure, words = Figure(figsize=size, layout="constrained", facecolor=PAPER), []
        yield figure, words
        drawn = io.StringIO()
        told = {"Date": None, "Description": " ".join(words)}
        figure.savefig(drawn, format="svg", metadata=told)
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>"
    before, defs, after = drawn.getvalue().partition(" <defs>")
    write_text(path, f"{before} {style}\n{defs}{after}")


def series(what: str, x: Iterable[object], y: Iterable[float]) -> str:
    """In words."""
    pairs = (
        f"{at if isinstance(at, str) else f'{at:.4g}'}: {value:.4g}" for at, value in zip(x, y, strict=True)
    )
    return f"{what}: {', '.join(pairs)}."
