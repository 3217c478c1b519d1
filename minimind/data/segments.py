"""From documents to segments: the stretches that rows are made of. NumPy only.

A segment is a stretch of one document that is trained on: its inputs are tokens[start : start + length], its
labels the same moved on by one, so a document of n tokens gives at most n - 1 positions.

Documents are looked at a few thousand at a time. What is kept is 4 bytes for each segment (8 in a store of
more than 2^32 tokens), and 2 to 4 more for each conversation while they are put in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from minimind.data.holdout import AllBut
from minimind.data.packing import Pieces, count_up, cut_to_fill, pieces_in, uncut
from minimind.data.store import TokenStore

DOCUMENTS_TOGETHER = 1 << 14  # even, for the two of a pair
SLAB_TOKENS = 1 << 20  # tokens looked at together: 8 MB of indices at most

Documents = np.ndarray | AllBut  # numbers of documents in a store, ascending


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
    """All segments: those of one position first, then those of two, …"""

    starts: np.ndarray  # (segments,) uint32 or int64, the first input token in the store
    counts: np.ndarray  # (max_seq_len + 1,) int64, how many have each length

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """(segments,) int64"""
        return np.arange(len(self.counts)).repeat(self.counts)

    @property
    def num_positions(self) -> int:
        return int(self.counts @ np.arange(len(self.counts)))


class Stretches(NamedTuple):
    """The segments of some documents, in the order of the store."""

    starts: np.ndarray  # int64
    lengths: np.ndarray  # int64
    documents: np.ndarray  # int64


def make_segments(
    store: TokenStore, documents: Documents, max_seq_len: int, eos_id: int
) -> tuple[Segments, CutReport]:
    """The segments of `documents`.

    Texts are split, conversations cut at the end of an answer, preference pairs kept whole.
    """
    report = CutReport(len(documents))
    if store.kind == "preference":
        parts = partial(whole_pairs, store, documents, max_seq_len)
        report.documents //= 2
    elif store.kind == "pretrain":
        parts = partial(split_texts, store, documents, max_seq_len)
    else:
        kept = positions_kept(store, documents, max_seq_len, eos_id, report)
        parts = partial(cut_conversations, store, documents, kept)
    counts = np.zeros(max_seq_len + 1, np.int64)
    for part in parts():
        counts += np.bincount(part.lengths, minlength=len(counts))
    if store.kind == "preference":
        report.dropped = report.documents - int(counts.sum())
    cuts = cut_to_fill(counts, max_seq_len) if store.kind == "pretrain" else uncut(counts)
    return put_in_order(parts(), counts, cuts, store, report), report


def split_texts(store: TokenStore, documents: Documents, max_seq_len: int) -> Iterator[Stretches]:
    """Segments that together predict every token of a document but its first, exactly once.

    A long document is split every `max_seq_len` positions.
    """
    for part in slabs(store, documents):
        positions = store.offsets[part + 1] - store.offsets[part] - 1
        numbers = -(-positions // max_seq_len)
        within = count_up(numbers) * max_seq_len
        yield Stretches(
            starts=store.offsets[part].repeat(numbers) + within,
            lengths=np.minimum(positions.repeat(numbers) - within, max_seq_len),
            documents=part.repeat(numbers),
        )


def cut_conversations(store: TokenStore, documents: Documents, kept: np.ndarray) -> Iterator[Stretches]:
    """One segment for each conversation of which some positions are `kept`, from its start."""
    done = 0
    for part in slabs(store, documents):
        lengths = kept[done : done + len(part)].astype(np.int64)
        done += len(part)
        part = part[lengths > 0]
        yield Stretches(store.offsets[part], lengths[lengths > 0], part)


def positions_kept(
    store: TokenStore, documents: Documents, max_seq_len: int, eos_id: int, report: CutReport
) -> np.ndarray:
    """(documents,) positions to keep of each conversation, 0 to drop it. Adds to `report`.

    They go to the end of the last answer that fits, the `<|im_end|>` which closes it: a target with the id
    `eos_id`. What follows the last answer teaches nothing and is left out always. A conversation whose first
    answer does not fit is dropped.
    """
    kept = np.zeros(len(documents), np.min_scalar_type(max_seq_len))
    done = 0
    for part in slabs(store, documents):
        kept[done : done + len(part)] = _cut_slab(store, part, max_seq_len, eos_id, report)
        done += len(part)
    return kept


def _cut_slab(
    store: TokenStore, documents: np.ndarray, max_seq_len: int, eos_id: int, report: CutReport
) -> np.ndarray:
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


def whole_pairs(store: TokenStore, documents: Documents, max_seq_len: int) -> Iterator[Stretches]:
    """One segment for both documents of each pair, named after the chosen one, the even.

    A pair that does not fit is dropped: half an answer has another log-probability than the whole.
    """
    for first in range(0, len(documents), DOCUMENTS_TOGETHER):
        chosen = documents[first : first + DOCUMENTS_TOGETHER][::2]
        starts = store.offsets[chosen]
        lengths = store.offsets[chosen + 2] - starts - 2  # positions: the last token of each has no label
        fits = lengths <= max_seq_len
        yield Stretches(starts[fits], lengths[fits], chosen[fits])
        store.release()


def slabs(store: TokenStore, documents: Documents) -> Iterator[np.ndarray]:
    """The numbers of `documents` in parts that begin within `SLAB_TOKENS` tokens of each other."""
    for first in range(0, len(documents), DOCUMENTS_TOGETHER):
        part = documents[first : first + DOCUMENTS_TOGETHER]
        for slab in np.split(part, np.flatnonzero(np.diff(store.offsets[part] // SLAB_TOKENS)) + 1):
            yield slab
            store.release()


def put_in_order(
    parts: Iterable[Stretches],
    counts: np.ndarray,
    cuts: Counter[Pieces],
    store: TokenStore,
    report: CutReport,
) -> Segments:
    """The segments of `parts` by their lengths, of which there are `counts`, cut into pieces as `cuts` says.

    The first ones of a length are those that are cut. Counts the documents in pieces in `report`.
    """
    in_order = sorted((sum(pieces), pieces, number) for pieces, number in cuts.items() if number)
    ends = np.cumsum([number for _, _, number in in_order])
    sizes = np.array([len(pieces) for _, pieces, _ in in_order], np.int64)
    firsts = sizes.cumsum() - sizes
    pieces_of_all = [pieces for _, pieces, _ in in_order]
    lengths_of_all = np.array([length for pieces in pieces_of_all for length in pieces], np.int64)
    before = np.array([sum(pieces[:i]) for pieces in pieces_of_all for i in range(len(pieces))], np.int64)

    whole, cut = Places(counts), Places(pieces_in(cuts, len(counts) - 1))
    starts = np.empty(cut.total, np.uint32 if store.num_tokens <= 1 << 32 else np.int64)
    for part in parts:
        form = np.searchsorted(ends, whole.take(part.lengths), side="right")
        number = sizes[form]
        piece = firsts[form].repeat(number) + count_up(number)
        starts[cut.take(lengths_of_all[piece])] = part.starts.repeat(number) + before[piece]
        report.split += int((np.unique_counts(part.documents.repeat(number)).counts > 1).sum())
    return Segments(starts, cut.counts)


class Places:
    """Gives each item a place of its own: those of one position come first, then those of two, …"""

    def __init__(self, counts: np.ndarray):
        self.counts = counts
        self.total = int(counts.sum())
        self._next = counts.cumsum() - counts

    def take(self, lengths: np.ndarray) -> np.ndarray:
        """(items,) int64, the next places."""
        by_length = np.argsort(lengths.astype(np.min_scalar_type(len(self.counts))), kind="stable")
        counts = np.bincount(lengths, minlength=len(self.counts))
        places = np.empty(len(lengths), np.int64)
        places[by_length] = self._next.repeat(counts) + count_up(counts)
        self._next += counts
        return places
