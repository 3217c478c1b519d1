"""The rows of every epoch: a pure function of (seed, epoch, row), for which nothing is kept.

All epochs have the same number of rows, made up alike. Which of the segments of one length takes which slot
of that length, and the order of the rows, are drawn anew for each. Attention and positions stay within a
segment (`batches` sees to that), so it means nothing which segments share a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimind.data.packing import pack
from minimind.data.segments import Segments
from minimind.data.shuffle import Shuffle

ORDER_VERSION = 2  # of what stands in which row; a run cannot go on with another
ROWS_TOGETHER = 1 << 16  # looked at at once


@dataclass
class Drawn:
    """What some rows hold, row after row."""

    starts: np.ndarray  # (segments,) int64, the first input token in the store
    lengths: np.ndarray  # (segments,) int64
    borders: np.ndarray  # (rows + 1,) int64: row r has the segments borders[r] … borders[r + 1] - 1

    def __len__(self) -> int:
        return len(self.borders) - 1


class Epochs:
    """Rows of `max_seq_len` positions with all `segments` in each epoch."""

    def __init__(self, segments: Segments, max_seq_len: int, seed: int):
        self.seed, self._segments = seed, segments
        self.rows = pack(segments.counts, max_seq_len)
        self._first = segments.counts.cumsum() - segments.counts  # of each length in `segments`
        # The rows take the place of segments without any position, which do not exist.
        self._sizes = np.concatenate([[len(self.rows)], segments.counts[1:]])
        self._latest: tuple[int, Shuffle] | None = None

    def draw(self, epoch: int, first: int, end: int) -> Drawn:
        """What rows `first` … `end - 1` of `epoch` hold."""
        shuffle = self._shuffle(epoch)
        slots = self.rows.slots(self._order(shuffle, first, end))
        places = self._first[slots.lengths] + shuffle(slots.lengths, slots.numbers)
        return Drawn(self._segments.starts[places].astype(np.int64), slots.lengths, slots.borders)

    def tokens(self, epoch: int, rows: int) -> int:
        """Positions that hold a token in the first `rows` rows of `epoch`."""
        shuffle = self._shuffle(epoch)
        parts = ((i, min(i + ROWS_TOGETHER, rows)) for i in range(0, rows, ROWS_TOGETHER))
        return sum(self.rows.filled(self._order(shuffle, first, end)) for first, end in parts)

    def _order(self, shuffle: Shuffle, first: int, end: int) -> np.ndarray:
        places = np.arange(first, end)
        return shuffle(np.zeros_like(places), places)

    def _shuffle(self, epoch: int) -> Shuffle:
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, Shuffle(self._sizes, [self.seed, epoch])
        return self._latest[1]
