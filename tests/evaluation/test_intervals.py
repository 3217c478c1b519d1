"""Wilson's interval against SciPy's, and what is called chance."""

from __future__ import annotations

import pytest

from minimind.evaluate.intervals import Share, wilson

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize(("right", "asked"), [(0, 1), (1, 1), (0, 7), (3, 11), (250, 1000), (2900, 11582)])
def test_the_interval_is_scipys(right, asked):
    peer = stats.binomtest(right, asked).proportion_ci(0.95, method="wilson")
    assert wilson(right, asked) == pytest.approx((peer.low, peer.high), abs=1e-6)


def test_nothing_asked_says_nothing():
    assert wilson(0, 0) == (0, 1)
    assert Share(0, 0).against(0.25) == "indistinguishable from chance"


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        (250, "indistinguishable from chance"),
        (276, "indistinguishable from chance"),
        (280, "better than chance"),
        (220, "worse than chance"),
    ],
)
def test_a_thousand_questions_tell_chance_from_three_points_more(right, verdict):
    assert Share(right, 1000).against(0.25) == verdict


def test_shown_in_percent():
    assert str(Share(250, 1000)) == "25.0 [22.4, 27.8]"
