"""Packing against a plain reading of its rules, on anything hypothesis thinks of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data.packing import Rows, count_up, cut_to_fill, pack, pieces_in


def rows_of(rows: Rows) -> list[list[int]]:
    """The lengths in each row."""
    slots = rows.slots(np.arange(len(rows)))
    return [part.tolist() for part in np.split(slots.lengths, slots.borders[1:-1])] if len(rows) else []


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The number of rows, one segment at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return len(spaces)


@given(st.data(), st.integers(1, 40))
@settings(max_examples=200)
def test_pack_is_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    rows = pack(np.bincount(lengths), capacity)
    assert Counter(length for row in rows_of(rows) for length in row) == Counter(lengths)
    assert all(0 < sum(row) <= capacity for row in rows_of(rows))
    assert len(rows) == best_fit_decreasing(lengths, capacity)


def test_nothing_packs_into_no_rows():
    rows = pack(np.zeros(9, np.int64), 8)
    assert (len(rows), rows_of(rows), rows.filled(np.arange(0))) == (0, [], 0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=80))
@settings(max_examples=100)
def test_slots_of_a_length_are_numbered_through(lengths):
    rows = pack(np.bincount(lengths), 12)
    slots = rows.slots(np.arange(len(rows)))
    numbered = sorted(zip(slots.lengths.tolist(), slots.numbers.tolist(), strict=True))
    assert numbered == [(n, i) for n, times in sorted(Counter(lengths).items()) for i in range(times)]
    # Any rows, in any order.
    some = np.random.default_rng(0).permutation(len(rows))[:3]
    here = rows.slots(some)
    for i, row in enumerate(some):
        for values, all_values in ((here.lengths, slots.lengths), (here.numbers, slots.numbers)):
            expected = all_values[slots.borders[row] : slots.borders[row + 1]]
            assert values[here.borders[i] : here.borders[i + 1]].tolist() == expected.tolist()
    assert rows.filled(some) == here.lengths.sum()


def test_count_up():
    assert count_up(np.array([2, 0, 3, 1])).tolist() == [0, 1, 0, 1, 2, 0]
    assert count_up(np.zeros(0, np.int64)).tolist() == []


def check_cuts(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The pieces by their length; every one of `lengths` is cut into some, and only once."""
    cuts = cut_to_fill(np.bincount(lengths, minlength=capacity + 1), capacity)
    wholes = Counter()
    for pieces, number in cuts.items():
        assert number > 0
        assert min(pieces) >= 1
        wholes[sum(pieces)] += number
    assert wholes == Counter(lengths.tolist())
    return pieces_in(cuts, capacity)


@given(st.data(), st.integers(1, 40))
@settings(max_examples=200)
def test_pieces_make_up_what_was_cut(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    pieces = check_cuts(np.array(lengths), capacity)
    assert len(pack(pieces, capacity)) <= best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [64, 512, 8192])
@pytest.mark.parametrize(("least", "most"), [(0.3, 0.45), (0.51, 0.53), (0.51, 0.75), (0.7, 0.7)])
def test_awkward_lengths_are_cut_until_rows_are_full(capacity, least, most):
    """Also where cutting takes several turns, and pieces are cut again."""
    lengths = np.random.default_rng(0).integers(int(least * capacity), int(most * capacity) + 1, 20_000)
    rows = pack(check_cuts(lengths, capacity), capacity)
    assert len(pack(np.bincount(lengths), capacity)) * capacity > 1.05 * lengths.sum()
    assert (len(rows) - 1) * capacity <= 1.011 * lengths.sum()
