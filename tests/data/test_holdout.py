"""What is held out: by contents alone, copies on one side, and the rest as an array that takes no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import holdout
from minimind.data.holdout import AllBut, all_documents, split_holdout
from minimind.data.store import TokenStore


def with_fingerprints(fingerprints: list[int]) -> TokenStore:
    n = len(fingerprints)
    return TokenStore(
        folder=Path(),
        meta={"kind": "pretrain"},
        tokens=np.zeros(2 * n, np.uint16),
        weights=None,
        offsets=np.arange(0, 2 * n + 1, 2),
        lines=np.arange(1, n + 1),
        fingerprints=np.array(fingerprints, np.uint32),
    )


@given(st.integers(0, 60), st.data())
@settings(max_examples=200)
def test_all_but_some(total, data):
    left_out = sorted(data.draw(st.sets(st.integers(0, total - 1)))) if total else []
    numbers = AllBut(total, np.array(left_out, np.int64))
    expected = [i for i in range(total) if i not in left_out]
    assert len(numbers) == len(expected)
    part = data.draw(st.slices(len(expected)))
    assert numbers[part].tolist() == expected[part]
    assert numbers[:].tolist() == expected


def test_all_documents():
    assert all_documents(with_fingerprints([5, 6, 7]))[:].tolist() == [0, 1, 2]


def test_holdout_depends_on_contents_alone():
    contents = np.random.default_rng(0).integers(0, 2**32, 5000).tolist()
    store = with_fingerprints(contents)
    training, held = split_holdout(store)
    assert len(held) == 50
    assert sorted([*training[:], *held]) == list(range(5000))
    assert (np.diff(training[:]) > 0).all()
    assert (np.diff(held) > 0).all()
    assert held.max() > 4000 > 1000 > held.min()  # from the whole file

    _, held_of_reversed = split_holdout(with_fingerprints(contents[::-1]))
    assert {contents[i] for i in held} == {contents[::-1][i] for i in held_of_reversed}
    _, more = split_holdout(store, fraction=0.02)
    assert {contents[i] for i in held} < {contents[i] for i in more}
    assert len(split_holdout(store, fraction=0.5, max_documents=200)[1]) == 200


def test_copies_are_on_one_side():
    contents = np.random.default_rng(1).integers(0, 400, 5000).tolist()
    training, held = split_holdout(with_fingerprints(contents), fraction=0.1)
    assert not {contents[i] for i in training[:]} & {contents[i] for i in held}
    assert 470 < len(held) <= 500
    # One text that makes up most of the file cannot be held out, and does not stop others from being.
    contents = [7] * 4000 + list(range(1000, 2000))
    training, held = split_holdout(with_fingerprints(contents))
    assert len(held) == 50
    assert held.min() >= 4000


def test_small_stores_hold_nothing_out():
    for count, expected in ((99, 0), (100, 1)):
        training, held = split_holdout(with_fingerprints(list(range(count))))
        assert (len(training), len(held)) == (count - expected, expected)


def plain_choice(fingerprints: list[int], wanted: int) -> list[int]:
    """The documents whose reordered fingerprints are the least, copies together, at most `wanted`."""
    mixed = [value * 2654435761 % 2**32 for value in fingerprints]
    held: set[int] = set()
    for value in sorted({*mixed}):
        copies = [i for i, other in enumerate(mixed) if other == value]
        if len(copies) > wanted:
            continue
        if len(held) + len(copies) > wanted:
            break
        held.update(copies)
    return sorted(held)


@given(
    st.lists(st.sampled_from([1, 2, 3, *range(100, 200)]), min_size=100, max_size=300),
    st.integers(1, 40),
    st.integers(1, 50),
)
@settings(max_examples=200)
def test_parts_make_no_difference(fingerprints, wanted, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "TOGETHER", together)
        training, held = split_holdout(with_fingerprints(fingerprints), 1.0, wanted)
    assert held.tolist() == plain_choice(fingerprints, wanted)
    assert sorted([*training[:], *held]) == list(range(len(fingerprints)))
