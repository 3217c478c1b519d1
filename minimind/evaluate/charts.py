"""Curves of a training log as inline SVG, in the colours of the page around them. No library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 448, 34, 214  # of the plot in the picture
COLOURS = ("var(--accent)", "var(--second)", "var(--third)", "var(--fourth)")
FEW = 40  # points that are marked one by one; more are a line, with their moving average
BUCKETS = 250  # a longer series is drawn by the lowest and the highest value in each of so many stretches
SPIKES = 0.02  # share of the values that may stick out of the top, where they would flatten all others


class Series(NamedTuple):
    """Values over the steps of a run; none of the two is empty."""

    label: str  # for the legend, where there are several
    steps: Sequence[float]
    values: Sequence[float]


def chart(title: str, series: Sequence[Series]) -> str:
    """Lines over the steps; a noisy series also gets its moving average."""
    bottom, top = value_range([value for s in series for value in s.values])
    first = min(s.steps[0] for s in series)
    last = max(s.steps[-1] for s in series)
    ticks = nice_ticks(bottom, top)
    bottom, top = min(bottom, ticks[0]), max(top, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - bottom) / ((top - bottom) or 1) * (BOTTOM - TOP)

    parts = [f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" class="y">{number(tick)}</text>')
    for tick in nice_ticks(first, last):
        if first <= tick <= last:
            parts.append(f'<text x="{x(tick):.1f}" y="{BOTTOM + 17}" class="x">{number(tick)}</text>')
    parts.append(f'<text x="{RIGHT}" y="{BOTTOM + 32}" class="y">step</text>')
    for one, colour in zip(series, COLOURS * len(series), strict=False):
        parts += line(one, colour, x, lambda value: max(y(value), TOP))
    highest = max(value for s in series for value in s.values)
    if highest > top:
        parts.append(f'<text x="{RIGHT}" y="{TOP - 6}" class="y">↑ {number(highest)}</text>')
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
        + legend(series)
    )


def line(series: Series, colour: str, x, y) -> list[str]:
    """The SVG of one series; `x` and `y` map steps and values to the picture."""

    def path(steps: Sequence[float], values: Sequence[float], style: str) -> str:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'

    if len(series.values) < FEW:
        dots = [
            f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6" fill="{colour}">'
            f"<title>{number(s)}: {v:.5g}</title></circle>"
            for s, v in zip(series.steps, series.values, strict=True)
        ]
        return [path(series.steps, series.values, 'stroke-width="1.2"'), *dots]
    if not is_noisy(series.values):
        return [path(*thinned(series.steps, series.values), 'stroke-width="1.8"')]
    smooth = moving_average(series.values)
    return [
        path(*thinned(series.steps, series.values), 'stroke-width="1" opacity="0.35"'),
        path(*thinned(series.steps, smooth), 'stroke-width="1.8"'),
    ]


def legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    names = (
        f'<span style="color: {colour}">●</span> {escape(s.label)}'
        for s, colour in zip(series, COLOURS * len(series), strict=False)
    )
    return f'<p class="legend">{" &nbsp; ".join(names)}</p>'


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """What the axis is to show: all, but for the very few that are more than twice as far up as the rest."""
    ordered = sorted(values)
    lowest, highest = ordered[0], ordered[-1]
    usual = ordered[min(len(ordered) - 1, math.floor((1 - SPIKES) * len(ordered)))]
    if highest - lowest > 2 * (usual - lowest) > 0:
        highest = usual
    if lowest == highest:
        pad = abs(lowest) / 10 or 1.0
        return lowest - pad, highest + pad
    return lowest, highest


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around [low, high], the outer ones at its ends or just outside."""
    rough = (high - low) / 4 or 1.0
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """`0.25`, `3e-4`, `12,500`: short, as an axis wants it."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The lowest and the highest point of each of `BUCKETS` stretches, in their order."""
    if len(values) <= 2 * BUCKETS:
        return list(steps), list(values)
    borders = [round(i * len(values) / BUCKETS) for i in range(BUCKETS + 1)]
    kept = []
    for start, end in pairwise(borders):
        places = range(start, end)
        kept += sorted({min(places, key=values.__getitem__), max(places, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def is_noisy(values: Sequence[float]) -> bool:
    """Whether a line goes up and down more than a learning rate does, once each."""
    way = sum(abs(after - before) for before, after in pairwise(values))
    return way > 3 * (max(values) - min(values))


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean of a fortieth of the series around each value, less of it near the ends."""
    sums = list(accumulate(values, initial=0.0))
    reach = len(values) // 80
    spans = ((max(i - reach, 0), min(i + reach + 1, len(values))) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
