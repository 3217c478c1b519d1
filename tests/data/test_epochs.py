"""Epochs hold everything once, in an order that depends on seed and epoch alone and has no pattern."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import epochs as epochs_module
from minimind.data.epochs import Epochs
from minimind.data.segments import Segments
from minimind.data.shuffle import Shuffle

# ---- Orders that are worked out ----


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(0, 99))
@settings(max_examples=200)
def test_a_shuffle_has_every_item_once(sizes, seed, epoch):
    shuffle = Shuffle(np.array(sizes), [seed, epoch])
    ranges = np.arange(len(sizes)).repeat(sizes)
    items = np.concatenate([np.arange(n) for n in sizes])
    together = shuffle(ranges, items)
    for i, n in enumerate(sizes):
        assert sorted(together[ranges == i].tolist()) == list(range(n))
    # Each on its own, and in any company.
    some = np.random.default_rng(seed).permutation(len(items))[:9]
    assert shuffle(ranges[some], items[some]).tolist() == together[some].tolist()


def order(n: int, *seed: int) -> np.ndarray:
    return Shuffle(np.array([n]), seed)(np.zeros(n, np.int64), np.arange(n))


def chi_squared(counts: np.ndarray) -> float:
    """Over its degrees of freedom: about 1 where all are equally likely."""
    expected = counts.mean()
    return float(((counts - expected) ** 2).sum() / expected / (counts.size - 1))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_about_equally_likely(n):
    found = Counter(tuple(order(n, seed)) for seed in range(6000))
    assert len(found) == np.prod(np.arange(1, n + 1))
    assert chi_squared(np.array([*found.values()])) < 2


@pytest.mark.parametrize("n", [1000, 50_000, 1_000_003])
def test_an_order_has_no_pattern(n):
    one, other = order(n, 1), order(n, 2)
    places = np.arange(n)

    def squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.histogram2d(x, y, bins=8, range=[(0, n)] * 2)[0]

    for counts in (
        squares(places, one),  # nothing stays near its place
        squares(one, other),  # nor near its place in another epoch
        squares(one[1:], one[:-1]),  # neighbours come from anywhere
        np.histogram((one[1:] - one[:-1]) % n, bins=64)[0],
        np.histogram((one[2:] - one[:-2]) % n, bins=64)[0],
    ):
        assert 0.4 < chi_squared(counts) < 1.8


def test_an_order_does_not_change():
    """Runs go on with the rows they have not seen; another order needs another `ORDER_VERSION`."""
    assert epochs_module.ORDER_VERSION == 2
    assert order(10, 42, 0).tolist() == [2, 9, 5, 6, 0, 7, 8, 3, 1, 4]
    assert order(1_000_000, 42, 1)[:4].tolist() == [151295, 528469, 102099, 274219]


# ---- Rows ----


def segments_of(lengths: list[int], max_seq_len: int) -> Segments:
    """One after the other in the store, the shortest first."""
    lengths = sorted(lengths)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint32)
    return Segments(starts, np.bincount(lengths, minlength=max_seq_len + 1))


def epoch_of(epochs: Epochs, epoch: int) -> list[list[tuple[int, int]]]:
    """The segments of each row, as (start, length)."""
    drawn = epochs.draw(epoch, 0, len(epochs.rows))
    segments = list(zip(drawn.starts.tolist(), drawn.lengths.tolist(), strict=True))
    return [segments[first:end] for first, end in pairwise(drawn.borders.tolist())]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=100)
def test_an_epoch_holds_every_segment_once(lengths, seed, epoch):
    segments = segments_of(lengths, 16)
    epochs = Epochs(segments, 16, seed)
    rows = epoch_of(epochs, epoch)
    everything = list(zip(segments.starts.tolist(), segments.lengths.tolist(), strict=True))
    assert sorted(chain.from_iterable(rows)) == everything
    assert all(0 < sum(length for _, length in row) <= 16 for row in rows)
    # A pure function of seed and epoch: of nothing that was asked before.
    again = Epochs(segments, 16, seed)
    again.draw(epoch + 1, 0, 1)
    for first in reversed(range(len(rows))):
        row = again.draw(epoch, first, first + 1)
        assert list(zip(row.starts.tolist(), row.lengths.tolist(), strict=True)) == rows[first]


def test_epochs_and_seeds_differ_in_order_and_in_company():
    segments = segments_of(np.random.default_rng(0).integers(1, 64, 500).tolist(), 64)
    first, second = (epoch_of(Epochs(segments, 64, 7), epoch) for epoch in (0, 1))
    other_seed = epoch_of(Epochs(segments, 64, 8), 0)
    for other in (second, other_seed):
        assert len(first) == len(other)
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
        assert len({frozenset(row) for row in first} & {frozenset(row) for row in other}) < len(first) / 2


def test_company_changes_where_all_rows_are_made_up_alike():
    """Two lengths of which there are equally many must not be ordered alike."""
    segments = segments_of([30] * 200 + [34] * 200, 64)
    first, second = ({frozenset(row) for row in epoch_of(Epochs(segments, 64, 7), epoch)} for epoch in (0, 1))
    assert len(first) == len(second) == 200
    assert len(first & second) < 20


def test_tokens_of_the_first_rows_are_counted(monkeypatch):
    monkeypatch.setattr(epochs_module, "ROWS_TOGETHER", 7)
    segments = segments_of(np.random.default_rng(0).integers(1, 64, 500).tolist(), 64)
    epochs = Epochs(segments, 64, 7)
    sums = [sum(length for _, length in row) for row in epoch_of(epochs, 3)]
    for rows in (0, 1, 7, 20, len(sums)):
        assert epochs.tokens(3, rows) == sum(sums[:rows])


def test_nothing_gives_no_rows():
    epochs = Epochs(Segments(np.zeros(0, np.uint32), np.zeros(9, np.int64)), 8, 0)
    assert len(epochs.rows) == len(epochs.draw(0, 0, 0)) == epochs.tokens(0, 0) == 0
