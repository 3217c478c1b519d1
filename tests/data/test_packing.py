"""Packing against a plain reading of its rules, on anything hypothesis thinks of and on real text."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import packing
from minimind.data.packing import Packing, Segments, cut_conversations, make_segments, pack, split_texts
from minimind.data.prepare import prepare
from minimind.data.store import TokenStore

EOS = 2


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def rows_of(rows: packing.Rows) -> list[list[int]]:
    return [part.tolist() for part in np.split(rows.slot_lengths, rows.first_slots[1:-1])]


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
@settings(max_examples=200, deadline=None)
def test_pack_is_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    rows = pack(np.array(lengths), capacity)
    assert Counter(rows.slot_lengths.tolist()) == Counter(lengths)
    assert all(0 < sum(row) <= capacity for row in rows_of(rows))
    assert len(rows) == best_fit_decreasing(lengths, capacity)


def test_nothing_packs_into_no_rows():
    assert len(pack(np.zeros(0, np.int32), 8)) == 0


@given(st.lists(st.integers(2, 60), min_size=1, max_size=60), st.integers(1, 24))
@settings(max_examples=200, deadline=None)
def test_every_token_of_a_text_is_a_label_once(lengths, max_seq_len):
    offsets = offsets_of(lengths)
    documents = np.arange(len(lengths))[::2]
    segments, report = split_texts(offsets, documents, max_seq_len)
    assert 1 <= segments.lengths.min() <= segments.lengths.max() <= max_seq_len
    labels = [
        (document, label)
        for start, length, document in zip(segments.starts, segments.lengths, segments.documents, strict=True)
        for label in range(start + 1, start + length + 1)
    ]
    expected = [(d, label) for d in documents for label in range(offsets[d] + 1, offsets[d + 1])]
    assert sorted(labels) == expected
    assert report.documents == len(documents)
    assert report.split == sum(n > 1 for n in Counter(segments.documents.tolist()).values())
    assert report.cut == report.dropped == report.lost_target_tokens == 0


@pytest.mark.parametrize("max_seq_len", [16, 340, 512])
@pytest.mark.parametrize("share", [0.3, 0.51, 0.7, 1.01, 1.5, 1.9])
@pytest.mark.parametrize("spread", [0, 0.05])
def test_texts_of_one_awkward_length_fill_the_rows(max_seq_len, share, spread):
    generator = np.random.default_rng(0)
    positions = generator.normal(share, spread, 3000).clip(0.1) * max_seq_len
    offsets = offsets_of(positions.astype(int) + 1)
    segments, report = split_texts(offsets, np.arange(3000), max_seq_len)
    rows = len(pack(segments.lengths, max_seq_len))
    labelled = np.zeros(offsets[-1], np.int64)
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        labelled[start + 1 : start + length + 1] += 1
    assert (labelled[offsets[:-1]] == 0).all()
    assert labelled.sum() == np.count_nonzero(labelled) == offsets[-1] - 3000
    assert (rows - 1) * max_seq_len <= 1.02 * segments.lengths.sum()
    if share == 0.7 and max_seq_len == 512:
        assert 0.2 < report.split / 3000 < 0.35  # a row holds one, and the others fill 30 % of it


def test_texts_that_fit_are_left_whole():
    offsets = offsets_of([65] * 800 + [33] * 100)
    segments, report = split_texts(offsets, np.arange(900), 512)
    assert len(segments) == 900
    assert report.split == 0


def build_store(conversations: list[list[tuple[int, int]]]) -> TokenStore:
    """Conversations of (user tokens, answer tokens): 1 5… 2 9 1 6… 2 9, with the 6… 2 for targets."""
    tokens, weights, lengths = [], [], []
    for turns in conversations:
        before = len(tokens)
        for question, answer in turns:
            tokens += [1, *[5] * question, 2, 9, 1, *[6] * answer, 2, 9]
            weights += [0] * (question + 4) + [1] * (answer + 1) + [0]
        lengths.append(len(tokens) - before)
    return TokenStore(
        folder=Path(),
        meta={"kind": "conversation"},
        tokens=np.array(tokens, np.uint16),
        weights=np.array(weights, np.uint8),
        offsets=offsets_of(lengths),
        lines=np.arange(1, len(lengths) + 1),
        fingerprints=np.arange(len(lengths), dtype=np.uint32),
    )


TURNS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=5)


@given(st.lists(TURNS, min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_conversations_end_with_the_last_answer_that_fits(conversations, max_seq_len, slab):
    store = build_store(conversations)
    documents = np.arange(store.num_documents)[: store.num_documents - 1 or None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SLAB_TOKENS", slab)
        segments, report = cut_conversations(store, documents, max_seq_len, EOS)

    expected, cut, dropped, lost = [], 0, 0, 0
    for d in documents:
        start, end = store.offsets[d], store.offsets[d + 1]
        ends = [p for p in range(start, end) if store.tokens[p] == EOS and store.weights[p]]
        fitting = [p for p in ends if p - start <= max_seq_len]
        kept_to = fitting[-1] if fitting else start
        if fitting:
            expected.append((start, kept_to - start, d))
        lost += store.weights[kept_to + 1 : end].sum()
        cut += bool(fitting) and fitting[-1] != ends[-1]
        dropped += not fitting
    found = zip(segments.starts, segments.lengths, segments.documents, strict=True)
    assert [tuple(map(int, segment)) for segment in found] == expected
    assert (report.documents, report.cut, report.dropped) == (len(documents), cut, dropped)
    assert report.lost_target_tokens == lost


def test_conversations_without_any_answer_are_dropped():
    store = build_store([[(3, 3)], [(2, 2)]])
    store.weights[:] = 0
    segments, report = cut_conversations(store, np.arange(2), 64, EOS)
    assert (len(segments), report.dropped) == (0, 2)
    segments, report = cut_conversations(store, np.arange(0), 64, EOS)
    assert (len(segments), report.documents) == (0, 0)


def segments_of(lengths: list[int]) -> Segments:
    n = len(lengths)
    return Segments(np.arange(n), np.array(lengths, np.int32), np.arange(n, dtype=np.int32))


def epoch_of(packed: Packing, epoch: int) -> list[list[int]]:
    return [packed.row(epoch, row).tolist() for row in range(len(packed.rows))]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_an_epoch_holds_every_segment_once(lengths, seed, epoch):
    packed = Packing(segments_of(lengths), 16, seed)
    rows = epoch_of(packed, epoch)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[segment] for segment in row) <= 16 for row in rows)
    # A pure function of seed and epoch: of nothing that was asked before.
    again = Packing(segments_of(lengths), 16, seed)
    again.row(epoch + 1, 0)
    assert [again.row(epoch, row).tolist() for row in reversed(range(len(rows)))] == rows[::-1]


def test_epochs_and_seeds_differ_in_order_and_in_company():
    lengths = np.random.default_rng(0).integers(1, 64, 500).tolist()
    first, second = (epoch_of(Packing(segments_of(lengths), 64, 7), epoch) for epoch in (0, 1))
    other_seed = epoch_of(Packing(segments_of(lengths), 64, 8), 0)
    for other in (second, other_seed):
        assert len(first) == len(other)
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
        assert len({frozenset(row) for row in first} & {frozenset(row) for row in other}) < len(first) / 2


@pytest.mark.parametrize("max_seq_len", [340, 512, 1024])
def test_real_text_leaves_little_padding(shared_data, tokenizer, tmp_path, max_seq_len):
    store = prepare(shared_data / "pretrain_val.jsonl.gz", "pretrain", tokenizer, cache_dir=tmp_path)
    segments, _ = make_segments(store, np.arange(store.num_documents), max_seq_len, EOS)
    assert segments.lengths.sum() == store.meta["num_target_tokens"]
    assert segments.lengths.sum() >= 0.98 * max_seq_len * len(pack(segments.lengths, max_seq_len))


@pytest.mark.parametrize("max_seq_len", [512, 1024])
def test_real_conversations_leave_little_padding(shared_data, tokenizer, tmp_path, max_seq_len):
    store = prepare(shared_data / "sft_mini_512.jsonl.gz", "conversation", tokenizer, cache_dir=tmp_path)
    segments, report = make_segments(store, np.arange(store.num_documents), max_seq_len, EOS)
    assert segments.lengths.sum() >= 0.98 * max_seq_len * len(pack(segments.lengths, max_seq_len))
    ends = store.tokens[segments.starts + segments.lengths]
    assert (ends == EOS).all()
    kept = sum(
        int(store.weights[start : start + length + 1].sum())
        for start, length in zip(segments.starts, segments.lengths, strict=True)
    )
    assert kept + report.lost_target_tokens == store.meta["num_target_tokens"]
