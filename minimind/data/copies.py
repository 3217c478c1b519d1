"""Records that an earlier one equals, or nearly equals, by their tokens.

Near copies share at least `NEAR` of their shingles, the stretches of `SHINGLE` tokens, counted as a set (the
Jaccard index). Candidates are found by MinHash with banding (Broder 1997, doi:10.1109/SEQUEN.1997.666900) and
then compared exactly. So nothing is called a copy that is none; of those just at the limit one in 35 is
missed, and hardly any above it. About 40 bytes are kept of each record.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minimind.data.store import TokenStore

SHINGLE = 5  # tokens
NEAR = 0.8
BANDS, ROWS = 5, 3  # records of index s meet in some band with probability 1 - (1 - s^ROWS)^BANDS
SLAB_TOKENS = 1 << 18  # hashed together; what they need fits into a processor's cache
COMPARED = 4  # earlier records that one is compared with in a band, at most
HASH = np.uint32(0x9E3779B1)  # odd, so that multiplying by it loses nothing


def find_copies(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """(exact, near): of every record whether an earlier one equals it, or else nearly equals it."""
    exact = exact_copies(store)
    return exact, near_copies(store, ~exact)


def exact_copies(store: TokenStore) -> np.ndarray:
    """(records,) bool: whether an earlier record equals it."""
    borders, fingerprints = store.record_offsets, store.fingerprints[:: store.documents_per_record]
    copies = np.zeros(len(fingerprints), bool)
    keys = fingerprints.astype(np.uint64) << np.uint64(32) | np.diff(borders).astype(np.uint64)
    for bucket in buckets(keys, np.arange(len(keys))):
        originals: list[np.ndarray] = []
        for record in bucket:
            tokens = store.tokens[borders[record] : borders[record + 1]]
            copies[record] = any(np.array_equal(tokens, original) for original in originals)
            if not copies[record]:
                originals.append(tokens)
    store.release()
    return copies


def near_copies(store: TokenStore, wanted: np.ndarray) -> np.ndarray:
    """Among the records where `wanted`; too short ones are nobody's."""
    borders = store.record_offsets
    copies = np.zeros(len(wanted), bool)
    records = np.flatnonzero(wanted & (np.diff(borders) >= 2 * SHINGLE))
    for keys in band_keys(store, borders):
        for bucket in buckets(keys[records], records):
            earlier: list[np.ndarray] = []
            for record in bucket:
                if copies[record] and len(earlier) == COMPARED:
                    continue
                shingles = np.unique(shingle_hashes(store.tokens[borders[record] : borders[record + 1]]))
                copies[record] |= any(jaccard(shingles, other) >= NEAR for other in earlier)
                if len(earlier) < COMPARED:
                    earlier.append(shingles)
    store.release()
    return copies


def buckets(keys: np.ndarray, records: np.ndarray) -> Iterator[np.ndarray]:
    """The `records` (ascending) that share their key with another one: those of each key, ascending."""
    order = np.argsort(keys, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(keys[order])) + 1, len(order))
    starts = np.append(0, ends[:-1])
    for i in np.flatnonzero(ends - starts > 1):
        yield records[order[starts[i] : ends[i]]]


def band_keys(store: TokenStore, borders: np.ndarray) -> np.ndarray:
    """(BANDS, records) uint32: near copies have the same in some band. Those of short records are void."""
    keys = np.zeros((BANDS, len(borders) - 1), np.uint32)
    multipliers = np.random.default_rng(0).integers(1, 1 << 31, (BANDS, ROWS), np.uint32) * 2 + 1
    slabs = np.flatnonzero(np.diff(borders[:-1] // SLAB_TOKENS)) + 1
    for slab in np.split(np.arange(len(borders) - 1), slabs):
        edges = borders[slab[0] : slab[-1] + 2] - borders[slab[0]]
        starts, ends = edges[:-1], edges[1:]
        hashes = shingle_hashes(store.tokens[borders[slab[0]] : borders[slab[-1] + 1]])
        hashes = np.append(hashes, np.zeros(ends[-1] - len(hashes), np.uint32))
        for i in range(1, SHINGLE):  # a shingle that reaches into the next record gives way to the first
            hashes[np.maximum(ends - i, starts)] = hashes[starts]
        for band in range(BANDS):
            for multiplier in multipliers[band]:
                least = np.minimum.reduceat(hashes * multiplier, starts)
                keys[band, slab] = keys[band, slab] * HASH + least
        store.release()
    return keys


def shingle_hashes(tokens: np.ndarray) -> np.ndarray:
    """(n - SHINGLE + 1,) uint32 for (n,) tokens: a number for each stretch."""
    count = max(len(tokens) - SHINGLE + 1, 0)
    hashes = np.zeros(count, np.uint32)
    for i in range(SHINGLE):
        hashes = (hashes + tokens[i : i + count].astype(np.uint32) + np.uint32(1)) * HASH
        hashes ^= hashes >> np.uint32(15)
    return hashes


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets, what they share by what they have in all."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
