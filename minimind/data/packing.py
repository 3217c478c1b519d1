"""Which lengths share a row: rows of `capacity` positions filled with stretches of 1 … capacity. NumPy only.

Rows are filled by best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024,
https://arxiv.org/abs/2404.10830). Stretches of one length are alike, and so are rows of one make-up, so both
are handled by their number. Neither work nor memory depends on how many there are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

Pieces = tuple[int, ...]  # lengths, for which one stretch is cut or which share a row


@dataclass
class Slots:
    """Places in rows, row after row: a slot takes a stretch of one certain length."""

    lengths: np.ndarray  # (slots,) int64
    numbers: np.ndarray  # (slots,) int64, of the slot among all of its length, from 0
    borders: np.ndarray  # (rows + 1,) int64: row r has the slots borders[r] … borders[r + 1] - 1


class Rows:
    """Rows by their make-up: so many with these lengths, so many with those, …"""

    def __init__(self, patterns: list[tuple[Pieces, int]]):
        self.patterns = patterns
        lengths, numbers, steps = [], [], []
        used: Counter[int] = Counter()  # slots of each length in the rows of the patterns before
        for pattern, rows in patterns:
            here: Counter[int] = Counter()
            for length in pattern:
                lengths.append(length)
                numbers.append(used[length] + here[length])
                here[length] += 1
            steps += [here[length] for length in pattern]
            for length, number in here.items():
                used[length] += number * rows
        self._ends = np.cumsum([0, *(rows for _, rows in patterns)])
        self._sizes = np.array([len(pattern) for pattern, _ in patterns], np.int64)
        self._sums = np.array([sum(pattern) for pattern, _ in patterns], np.int64)
        self._first_slots = self._sizes.cumsum() - self._sizes
        self._lengths = np.array(lengths, np.int64)
        self._numbers = np.array(numbers, np.int64)  # in the first row of the pattern
        self._steps = np.array(steps, np.int64)  # from one row to the next

    def __len__(self) -> int:
        return int(self._ends[-1])

    def slots(self, rows: np.ndarray) -> Slots:
        """The slots of these rows."""
        pattern = self._pattern(rows)
        sizes = self._sizes[pattern]
        slot = self._first_slots[pattern].repeat(sizes) + count_up(sizes)
        nth = (rows - self._ends[pattern]).repeat(sizes)
        numbers = self._numbers[slot] + nth * self._steps[slot]
        return Slots(self._lengths[slot], numbers, np.concatenate([[0], sizes.cumsum()]))

    def filled(self, rows: np.ndarray) -> int:
        """Positions of these rows that are taken."""
        return int(self._sums[self._pattern(rows)].sum())

    def _pattern(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, rows, side="right") - 1


def count_up(sizes: np.ndarray) -> np.ndarray:
    """0 … s - 1 for each s of `sizes`, one after the other."""
    return np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)


def pack(counts: np.ndarray, capacity: int) -> Rows:
    """Place `counts[n]` stretches of each length n (1 … capacity) in rows by best-fit decreasing.

    The longest come first, and each goes to the row with the least space that still holds it. The work grows
    with the square of `capacity` at worst.
    """
    patterns: dict[int, list[tuple[Pieces, int]]] = defaultdict(list)  # space -> (lengths, rows)
    spaces: list[int] = []  # the keys of `patterns` that have rows, ascending

    def put(space: int, pattern: Pieces, rows: int) -> None:
        if rows and not patterns[space]:
            insort(spaces, space)
        if rows:
            patterns[space].append((pattern, rows))

    pattern: Pieces
    for length in map(int, np.flatnonzero(counts)[::-1]):
        left = int(counts[length])
        while left:
            i = bisect_left(spaces, length)
            is_new = i == len(spaces)
            if is_new:
                space, pattern, rows = capacity, (), left
            else:
                space = spaces[i]
                pattern, rows = patterns[space].pop()
                if not patterns[space]:
                    del spaces[i]
            # A row takes all it can before the next: once it has taken one, its space is the least of all.
            each = space // length
            filled, remainder = divmod(left, each) if left < rows * each else (rows, 0)
            put(space - each * length, pattern + (length,) * each, filled)
            put(space - remainder * length, pattern + (length,) * remainder, int(remainder > 0))
            if not is_new:
                put(space, pattern, rows - filled - int(remainder > 0))
            left -= filled * each + remainder
    return Rows([item for items in patterns.values() for item in items])


# ---- Stretches that may be cut ----


def cut_to_fill(counts: np.ndarray, capacity: int) -> Counter[Pieces]:
    """How many stretches to cut into which pieces, so that rows are full. Most stay whole: one piece.

    Only stretches that all have about the same awkward length would leave much of the rows empty. Then as
    many as it takes are cut.
    """
    cuts = uncut(counts)
    positions = int(counts @ np.arange(len(counts)))
    for _ in range(4):  # once is nearly always enough
        rows = pack(pieces_in(cuts, capacity), capacity)
        if len(rows) <= 1 + 1.01 * positions / capacity:  # the last row may well be empty
            break
        _cut_further(cuts, _pour(rows, capacity))
    return +cuts


def uncut(counts: np.ndarray) -> Counter[Pieces]:
    """`counts[n]` stretches of each length n, all left whole."""
    return Counter({(int(length),): int(counts[length]) for length in np.flatnonzero(counts)})


def pieces_in(cuts: Counter[Pieces], capacity: int) -> np.ndarray:
    """(capacity + 1,) int64, how many pieces there are of each length."""
    counts = np.zeros(capacity + 1, np.int64)
    for pieces, number in cuts.items():
        for length in pieces:
            counts[length] += number
    return counts


def _pour(rows: Rows, capacity: int) -> Counter[tuple[int, Pieces]]:
    """How to cut the stretches in the emptiest rows (length, pieces) to fill the gaps of the others."""
    smallest = max(1, capacity // 64)  # a smaller piece would learn next to nothing
    by_gap = sorted(((capacity - sum(pattern), pattern, n) for pattern, n in rows.patterns), reverse=True)
    usable = [gap if gap >= smallest else 0 for gap, _, _ in by_gap]
    room = sum(space * n for space, (_, _, n) in zip(usable, by_gap, strict=True))
    poured: Counter[int] = Counter()
    gaps: list[tuple[int, int]] = []  # (positions, rows), the widest last
    for space, (gap, pattern, n) in zip(usable, by_gap, strict=True):
        # Pouring out one row takes room for its stretches, and its own gap is gone as well.
        taken = min(n, room // (capacity - gap + space))
        room = room - taken * (capacity - gap + space) if taken == n else 0
        for length in pattern:
            poured[length] += taken
        if space and taken < n:
            gaps.append((space, n - taken))
    return _into_gaps(poured, gaps[::-1])


def _into_gaps(poured: Counter[int], gaps: list[tuple[int, int]]) -> Counter[tuple[int, Pieces]]:
    """Fill `gaps`, the last first, with the `poured` stretches, each cut where a gap is full."""
    cut: Counter[tuple[int, Pieces]] = Counter()
    # (length, pieces cut off, rest, how many), the longest last
    waiting: list[tuple[int, Pieces, int, int]] = []
    waiting += [(length, (), length, n) for length, n in sorted(poured.items()) if n]
    while waiting and gaps:
        length, pieces, rest, n = waiting.pop()
        gap, rows = gaps.pop()
        both = min(n, rows)
        if both < n:
            waiting.append((length, pieces, rest, n - both))
        if both < rows:
            gaps.append((gap, rows - both))
        piece = min(rest, gap)
        if rest > piece:
            waiting.append((length, (*pieces, piece), rest - piece, both))
        else:
            cut[length, (*pieces, piece)] += both
            if gap > piece:
                gaps.append((gap - piece, both))
    for length, pieces, rest, n in waiting:  # what is left over goes to rows of its own
        cut[length, (*pieces, rest)] += n
    return cut


def _cut_further(cuts: Counter[Pieces], further: Counter[tuple[int, Pieces]]) -> None:
    """Cut so many of the pieces of a length into smaller ones, changing `cuts`."""
    having: defaultdict[int, list[Pieces]] = defaultdict(list)  # keys of `cuts` by the lengths in them
    for key in cuts:
        for length in {*key}:
            having[length].append(key)
    for (length, pieces), number in further.items():
        while number and len(pieces) > 1:
            key = having[length][-1]
            n = min(number, cuts[key])
            if not n:
                having[length].pop()
                continue
            at = key.index(length)
            rest = (*key[:at], *key[at + 1 :])
            new = (*key[:at], *pieces, *key[at + 1 :])
            cuts[key] -= n
            cuts[new] += n
            number -= n
            for other in {*rest}:
                having[other].append(new)
