"""From documents to rows of `max_seq_len` positions, nearly without padding. NumPy only.

A segment is a stretch of one document that is trained on: its inputs are tokens[start : start + length], its
labels the same moved on by one, so a document of n tokens gives at most n - 1 positions. Rows are filled
with whole segments by best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al.
2024, https://arxiv.org/abs/2404.10830). Attention and positions stay within a segment (`batches` sees to
that), so it means nothing which segments share a row, and each epoch draws it anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from minimind.data.store import TokenStore

SLAB_TOKENS = 1 << 22  # tokens looked at together when conversations are cut: 32 MB of indices at most


@dataclass
class CutReport:
    """What became of the documents on their way into segments; for the log."""

    documents: int
    split: int = 0  # pretraining texts made into several segments
    cut: int = 0  # conversations that end earlier, at the end of an answer
    dropped: int = 0  # conversations whose first answer does not fit, pairs that do not
    lost_target_tokens: int = 0  # of the conversations cut or dropped


@dataclass
class Segments:
    """One entry per segment."""

    starts: np.ndarray  # int64, the first input token in the store
    lengths: np.ndarray  # int32, positions: 1 … max_seq_len
    documents: np.ndarray  # int32, the document of the store

    def __len__(self) -> int:
        return len(self.starts)


def make_segments(
    store: TokenStore, documents: np.ndarray, max_seq_len: int, eos_id: int
) -> tuple[Segments, CutReport]:
    """The segments of `documents` (ascending).

    Texts are split, conversations cut at the end of an answer, preference pairs kept whole.
    """
    if store.kind == "preference":
        return whole_pairs(store.offsets, documents, max_seq_len)
    if store.weights is None:
        return split_texts(store.offsets, documents, max_seq_len)
    return cut_conversations(store, documents, max_seq_len, eos_id)


def split_texts(offsets: np.ndarray, documents: np.ndarray, max_seq_len: int) -> tuple[Segments, CutReport]:
    """Segments that together predict every token of a document but its first, exactly once.

    A long document is split every `max_seq_len` positions. Texts that all have about the same awkward length
    would still leave much of the rows empty; then as many as it takes are split further, to fill the gaps.
    """
    positions = np.diff(offsets)[documents] - 1
    counts = -(-positions // max_seq_len)
    within = (np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)) * max_seq_len
    segments = Segments(
        starts=offsets[documents].repeat(counts) + within,
        lengths=np.minimum(positions.repeat(counts) - within, max_seq_len).astype(np.int32),
        documents=documents.repeat(counts).astype(np.int32),
    )
    for _ in range(4):  # once is nearly always enough
        rows = pack(segments.lengths, max_seq_len)
        if len(rows) <= 1 + 1.01 * positions.sum() / max_seq_len:  # the last row may well be empty
            break
        segments = _fill_gaps(segments, rows, max_seq_len)
    split = int((np.unique_counts(segments.documents).counts > 1).sum())
    return segments, CutReport(len(documents), split=split)


def _fill_gaps(segments: Segments, rows: Rows, max_seq_len: int) -> Segments:
    """Pour the segments of the emptiest rows into the gaps of the others, splitting them where a gap ends."""
    gaps = max_seq_len - np.add.reduceat(rows.slot_lengths, rows.first_slots[:-1])
    usable = np.where(gaps >= max_seq_len // 64, gaps, 0)  # a smaller piece would learn next to nothing
    emptiest = np.argsort(-gaps, kind="stable")
    # Pouring out one row takes room for its segments, and its own gap is gone as well.
    needed = (max_seq_len - gaps + usable)[emptiest].cumsum()
    poured, filled = np.split(emptiest, [np.searchsorted(needed, usable.sum(), side="right")])

    is_poured = np.isin(np.arange(len(rows)), poured).repeat(np.diff(rows.first_slots))
    by_length = np.argsort(segments.lengths, kind="stable")
    chosen = by_length[is_poured[np.argsort(rows.slot_lengths, kind="stable")]]

    # The chosen segments in one line, cut where a segment ends and where a gap is full.
    ends = segments.lengths[chosen].cumsum(dtype=np.int64)
    cuts = np.union1d(ends, usable[filled].cumsum(dtype=np.int64))
    cuts = cuts[(cuts > 0) & (cuts <= segments.lengths[chosen].sum())]
    lengths = np.diff(cuts, prepend=0)
    begins = cuts - lengths
    source = np.searchsorted(ends, begins, side="right")  # the chosen segment each piece comes from
    starts = segments.starts[chosen][source] + begins - (ends - segments.lengths[chosen])[source]

    kept = np.setdiff1d(np.arange(len(segments)), chosen)
    return Segments(
        starts=np.concatenate([segments.starts[kept], starts]),
        lengths=np.concatenate([segments.lengths[kept], lengths.astype(np.int32)]),
        documents=np.concatenate([segments.documents[kept], segments.documents[chosen][source]]),
    )


def cut_conversations(
    store: TokenStore, documents: np.ndarray, max_seq_len: int, eos_id: int
) -> tuple[Segments, CutReport]:
    """One segment for each conversation, from its start to the end of the last answer that fits.

    That end is the `<|im_end|>` which closes the answer: a target with the id `eos_id`. What follows the last
    answer teaches nothing and is left out always. A conversation whose first answer does not fit is dropped.
    """
    report = CutReport(len(documents))
    slabs = np.flatnonzero(np.diff(store.offsets[documents] // SLAB_TOKENS)) + 1
    parts = [_cut_slab(store, slab, max_seq_len, eos_id, report) for slab in np.split(documents, slabs)]
    lengths = np.concatenate(parts)
    kept = lengths > 0
    starts = store.offsets[documents[kept]]
    return Segments(starts, lengths[kept].astype(np.int32), documents[kept].astype(np.int32)), report


def _cut_slab(
    store: TokenStore, documents: np.ndarray, max_seq_len: int, eos_id: int, report: CutReport
) -> np.ndarray:
    """The positions (documents,) to keep of each conversation, 0 to drop it. Adds to `report`."""
    if not len(documents):
        return np.zeros(0, np.int64)
    starts, ends = store.offsets[documents], store.offsets[documents + 1]
    assert store.weights is not None  # as all conversations have
    targets = starts[0] + np.flatnonzero(store.weights[starts[0] : ends[-1]])
    answer_ends = targets[store.tokens[targets] == eos_id]
    # The label of position p is token p + 1, so the last token within reach is start + max_seq_len.
    found = np.searchsorted(answer_ends, np.minimum(starts + max_seq_len, ends - 1), side="right") - 1
    last = np.concatenate([answer_ends, [-1]])[found]  # found is -1 where there is none at all
    lengths = np.where(last > starts, last - starts, 0)

    lost = np.searchsorted(targets, ends) - np.searchsorted(targets, starts + lengths, side="right")
    report.dropped += int((lengths == 0).sum())
    report.cut += int(((lengths > 0) & (lost > 0)).sum())
    report.lost_target_tokens += int(lost.sum())
    return lengths


def whole_pairs(offsets: np.ndarray, documents: np.ndarray, max_seq_len: int) -> tuple[Segments, CutReport]:
    """One segment for both documents of each pair, named after the chosen one, the even.

    A pair that does not fit is dropped: half an answer has another log-probability than the whole.
    """
    chosen = documents[::2]
    lengths = offsets[chosen + 2] - offsets[chosen] - 2  # positions: the last token of each has no label
    fits = lengths <= max_seq_len
    report = CutReport(len(chosen), dropped=int((~fits).sum()))
    kept = chosen[fits]
    return Segments(offsets[kept], lengths[fits].astype(np.int32), kept.astype(np.int32)), report


@dataclass
class Rows:
    """How rows are made up. A slot is a place in a row for a segment of one certain length."""

    slot_lengths: np.ndarray  # (segments,) int32, row after row
    first_slots: np.ndarray  # (rows + 1,) int64: row r has the slots first_slots[r] … first_slots[r + 1] - 1

    def __len__(self) -> int:
        return len(self.first_slots) - 1


def pack(lengths: np.ndarray, capacity: int) -> Rows:
    """Place segments of these `lengths` (1 … capacity) in rows by best-fit decreasing.

    The longest come first, and each goes to the row with the least space that still holds it. Segments of one
    length are alike, and so are rows of one make-up, so both are handled by their number: the work grows with
    the square of `capacity` at worst, and not with the number of segments.
    """
    patterns: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)  # space -> (lengths, rows)
    spaces: list[int] = []  # the keys of `patterns` that have rows, ascending

    def put(space: int, pattern: tuple[int, ...], rows: int) -> None:
        if rows and not patterns[space]:
            insort(spaces, space)
        if rows:
            patterns[space].append((pattern, rows))

    counts = np.bincount(lengths, minlength=1)
    pattern: tuple[int, ...]
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
    return _lay_out([item for items in patterns.values() for item in items])


def _lay_out(patterns: list[tuple[tuple[int, ...], int]]) -> Rows:
    """Rows of each pattern, as often as it is used."""
    slot_lengths = [np.tile(np.array(pattern, np.int32), rows) for pattern, rows in patterns]
    slots_per_row = np.repeat([len(pattern) for pattern, _ in patterns], [rows for _, rows in patterns])
    return Rows(
        slot_lengths=np.concatenate([*slot_lengths, np.zeros(0, np.int32)]),
        first_slots=np.concatenate([[0], slots_per_row.cumsum()]).astype(np.int64),
    )


class Packing:
    """The rows of every epoch: a pure function of (seed, epoch), drawn anew for each.

    All epochs have the same number of rows, made up alike. Which of the segments of one length takes which
    slot of that length, and the order of the rows, are random.
    """

    def __init__(self, segments: Segments, max_seq_len: int, seed: int):
        self.segments, self.seed = segments, seed
        self.rows = pack(segments.lengths, max_seq_len)
        self._slots_by_length = np.argsort(self.rows.slot_lengths, kind="stable").astype(np.int32)
        self._epoch: int | None = None

    def row(self, epoch: int, index: int) -> np.ndarray:
        """The segments in row `index` of `epoch`, as indices into `segments`."""
        if epoch != self._epoch:
            self._order, self._occupants = self._shuffle(epoch)
            self._epoch = epoch
        first, end = self.rows.first_slots[self._order[index] :][:2]
        return self._occupants[first:end]

    def tokens(self, epoch: int, rows: int) -> int:
        """Positions that hold a token in the first `rows` rows of `epoch`."""
        in_row = np.add.reduceat(self.rows.slot_lengths, self.rows.first_slots[:-1], dtype=np.int64)
        order = self._shuffle(epoch)[0]
        return int(in_row[order[:rows]].sum())

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the rows (rows,), and the segment in each slot (segments,)."""
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = generator.permutation(len(self.segments)).astype(np.int32)
        by_length = shuffled[np.argsort(self.segments.lengths[shuffled], kind="stable")]
        occupants = np.empty_like(by_length)
        occupants[self._slots_by_length] = by_length
        return generator.permutation(len(self.rows)), occupants
