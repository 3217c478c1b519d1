"""Which documents of a store are trained on, and which are held out to measure on. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minimind.data.store import TokenStore

TOGETHER = 1 << 18  # documents looked at at once


class AllBut:
    """The numbers 0 … total - 1 without those `left_out` (ascending): an array that takes no memory."""

    def __init__(self, total: int, left_out: np.ndarray):
        self._length = total - len(left_out)
        self._left_before = left_out - np.arange(len(left_out))  # numbers here before each of them

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """The numbers of a stretch, int64."""
        places = np.arange(*part.indices(self._length))
        return places + np.searchsorted(self._left_before, places, side="right")


def all_documents(store: TokenStore) -> AllBut:
    return AllBut(store.num_documents, np.zeros(0, np.int64))


def split_holdout(
    store: TokenStore, fraction: float = 0.01, max_documents: int = 1000
) -> tuple[AllBut, np.ndarray]:
    """(documents to train on, documents held out), both ascending.

    The choice depends on contents alone, so the copies of a document are all on the same side, and so are the
    two documents of a preference pair. A store of less than 100 documents is too small to hold any out.
    """
    total = store.num_documents
    wanted = min(int(total * fraction), max_documents) if total >= 100 else 0
    if not wanted:
        return all_documents(store), np.zeros(0, np.int64)
    values, counts = _least(store, wanted + total // (wanted + 1))  # of the second there may be too many
    values, counts = values[counts <= wanted], counts[counts <= wanted]
    values = values[counts.cumsum() <= wanted]
    held = [first + np.flatnonzero(np.isin(mixed, values)) for first, mixed in _mixed(store)]
    left_out = np.concatenate(held)
    return AllBut(total, left_out), left_out


def _mixed(store: TokenStore) -> Iterator[tuple[int, np.ndarray]]:
    """(first document, fingerprints) of all documents, reordered one to one: multiplied by an odd number."""
    for first in range(0, store.num_documents, TOGETHER):
        yield first, store.fingerprints[first : first + TOGETHER] * np.uint32(2654435761)
        store.release()


def _least(store: TokenStore, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The least `wanted` values of `_mixed`, ascending, and how often each is there."""
    values, counts = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    for _, mixed in _mixed(store):
        found = np.unique_counts(mixed)
        values, place = np.unique(np.concatenate([values, found.values]), return_inverse=True)
        together = np.zeros(len(values), np.int64)
        np.add.at(together, place, np.concatenate([counts, found.counts]))
        values, counts = values[:wanted], together[:wanted]
    return values, counts
