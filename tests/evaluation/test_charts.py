"""Curves: what is drawn where."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from minimind.evaluate.charts import (
    BUCKETS,
    Series,
    chart,
    is_noisy,
    moving_average,
    nice_ticks,
    number,
    thinned,
    value_range,
)


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line."""
    lines = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def drawing(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg[: svg.index("</svg>") + 6])


def test_a_short_series_is_marked_point_by_point():
    svg = chart("a & b", [Series("", [0, 50, 100], [1.0, 3.0, 2.0])])
    tree = drawing(svg)  # well-formed, with the title escaped
    assert tree.get("aria-label") == "a & b"
    assert len(tree.findall("circle")) == 3
    ((x0, y0), (x1, y1), (x2, y2)) = points(svg)[0]
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # larger is higher
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)


def test_a_noisy_series_gets_an_average_and_a_smooth_one_does_not():
    steps = list(range(100))
    noisy = chart("", [Series("", steps, [i % 3 for i in steps])])
    smooth = chart("", [Series("", steps, [min(i, 100 - i) for i in steps])])
    assert len(points(noisy)) == 2
    assert len(points(smooth)) == 1
    average = points(noisy)[1]
    assert max(y for _, y in average) - min(y for _, y in average) < 60


def test_two_series_share_the_axes_and_have_a_legend():
    svg = chart("", [Series("one<", [0, 10], [0, 10]), Series("two", [5, 10], [10, 10])])
    first, second = points(svg)
    assert first[-1] == second[-1]
    assert second[0][0] == pytest.approx((first[0][0] + first[1][0]) / 2, abs=0.2)
    assert "one&lt;" in svg


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 2e-12], [-1e30, 1e30], [7, 8e9]])
def test_any_numbers_make_a_picture(values):
    svg = chart("", [Series("", list(range(len(values))), values)])
    drawing(svg)
    assert "nan" not in svg
    assert "inf" not in svg


def test_ticks_are_round_and_hold_the_range():
    assert nice_ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert nice_ticks(1.32, 1.9) == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])
    assert nice_ticks(0, 3e-4)[-1] == pytest.approx(3e-4)
    for low, high in ((0.1, 0.7), (-3, 8), (1e3, 1.001e3), (2.99, 3.01)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-9
        assert ticks[-1] >= high - 1e-9
        assert 3 <= len(ticks) <= 7


def test_a_spike_does_not_flatten_the_rest_and_is_told():
    values = [1.0 + (i % 10) / 10 for i in range(1000)]
    values[500] = 1000.0
    assert value_range(values) == (1.0, 1.9)
    assert "↑ 1,000" in chart("", [Series("", list(range(1000)), values)])
    assert value_range([1.0, 2.0, 4.0]) == (1.0, 4.0)


def test_long_series_keep_their_extremes():
    values = [0.0] * 100_000
    values[12_345], values[54_321] = 9.0, -9.0
    steps, kept = thinned(list(range(100_000)), values)
    assert len(kept) <= 2 * BUCKETS
    assert steps[kept.index(9.0)] == 12_345
    assert steps[kept.index(-9.0)] == 54_321
    assert steps == sorted(steps)


def test_the_average_lags_nowhere():
    values = [float(i) for i in range(400)]
    assert moving_average(values)[200] == pytest.approx(200)
    assert not is_noisy(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (3e-4, "3e-4"), (12500, "12,500"), (-2.5, "-2.5"), (0.1 + 0.2, "0.3")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
