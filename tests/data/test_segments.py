"""Segments against a plain reading of the documents, made up and real."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import segments as segments_module
from minimind.data.holdout import AllBut, all_documents
from minimind.data.packing import pack
from minimind.data.prepare import prepare
from minimind.data.segments import CutReport, Documents, Segments, make_segments
from minimind.data.store import TokenStore

EOS = 2


def store_of(
    lengths: list[int],
    kind: str = "pretrain",
    tokens: list[int] | None = None,
    weights: list[int] | None = None,
) -> TokenStore:
    """Documents of so many tokens."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = len(lengths)
    return TokenStore(
        folder=Path(),
        meta={"kind": kind},
        tokens=np.zeros(offsets[-1], np.uint16) if tokens is None else np.array(tokens, np.uint16),
        weights=None if weights is None else np.array(weights, np.uint8),
        offsets=offsets,
        lines=np.arange(1, n + 1),
        fingerprints=np.arange(n, dtype=np.uint32),
    )


def segments_in_parts(
    store: TokenStore, documents: Documents, max_seq_len: int, slab: int = 50
) -> tuple[Segments, CutReport]:
    """`make_segments` in parts small enough for a test to have several; checks the order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "DOCUMENTS_TOGETHER", 6)
        patch.setattr(segments_module, "SLAB_TOKENS", slab)
        segments, report = make_segments(store, documents, max_seq_len, EOS)
    assert len(segments.counts) == max_seq_len + 1
    assert np.bincount(segments.lengths, minlength=max_seq_len + 1).tolist() == segments.counts.tolist()
    assert (np.diff(segments.lengths) >= 0).all()
    assert segments.num_positions == segments.lengths.sum()
    return segments, report


def stretches_of(store: TokenStore, segments: Segments) -> list[tuple[int, int, int]]:
    """(document, start, length) of each, ascending."""
    documents = store.documents_at(segments.starts)
    return sorted(zip(*(a.tolist() for a in (documents, segments.starts, segments.lengths)), strict=True))


# ---- Texts ----


@given(st.lists(st.integers(2, 60), min_size=1, max_size=60), st.integers(1, 24))
@settings(max_examples=200)
def test_every_token_of_a_text_is_a_label_once(lengths, max_seq_len):
    store = store_of(lengths)
    documents = np.arange(len(lengths))[::2]
    segments, report = segments_in_parts(store, documents, max_seq_len)
    assert 1 <= segments.lengths.min() <= segments.lengths.max() <= max_seq_len
    stretches = stretches_of(store, segments)
    labels = [(d, label) for d, start, n in stretches for label in range(start + 1, start + n + 1)]
    offsets = store.offsets
    assert labels == [(d, label) for d in documents for label in range(offsets[d] + 1, offsets[d + 1])]
    assert report.documents == len(documents)
    assert report.split == sum(n > 1 for n in Counter(d for d, _, _ in stretches).values())
    assert report.cut == report.dropped == report.lost_target_tokens == 0


@given(st.lists(st.integers(2, 60), min_size=1, max_size=60), st.integers(1, 24))
@settings(max_examples=50)
def test_parts_make_no_difference(lengths, max_seq_len):
    store = store_of(lengths)
    whole, report = make_segments(store, all_documents(store), max_seq_len, EOS)
    parts, same_report = segments_in_parts(store, all_documents(store), max_seq_len)
    assert whole.starts.tolist() == parts.starts.tolist()
    assert report == same_report


@pytest.mark.parametrize("max_seq_len", [16, 340, 512])
@pytest.mark.parametrize("share", [0.3, 0.51, 0.7, 1.01, 1.5, 1.9])
@pytest.mark.parametrize("spread", [0, 0.05])
def test_texts_of_one_awkward_length_fill_the_rows(max_seq_len, share, spread):
    generator = np.random.default_rng(0)
    positions = generator.normal(share, spread, 3000).clip(0.1) * max_seq_len
    store = store_of((positions.astype(int) + 1).tolist())
    segments, report = make_segments(store, all_documents(store), max_seq_len, EOS)
    rows = len(pack(segments.counts, max_seq_len))
    labelled = np.zeros(store.num_tokens, np.int64)
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        labelled[start + 1 : start + length + 1] += 1
    assert (labelled[store.offsets[:-1]] == 0).all()
    assert labelled.sum() == np.count_nonzero(labelled) == store.num_tokens - 3000
    assert (rows - 1) * max_seq_len <= 1.02 * segments.num_positions
    if share == 0.7 and max_seq_len == 512:
        assert 0.2 < report.split / 3000 < 0.35  # a row holds one, and the others fill 30 % of it


def test_texts_that_fit_are_left_whole():
    store = store_of([65] * 800 + [33] * 100)
    segments, report = segments_in_parts(store, all_documents(store), 512)
    assert len(segments) == 900
    assert report.split == 0


@pytest.mark.parametrize(("tokens", "size"), [(1 << 32, 4), ((1 << 32) + 1, 8)])
def test_a_place_takes_four_bytes_as_long_as_it_can(monkeypatch, tokens, size):
    store = store_of([5, 9])
    monkeypatch.setattr(TokenStore, "num_tokens", tokens)
    assert make_segments(store, all_documents(store), 8, EOS)[0].starts.itemsize == size


# ---- Conversations ----


def build_store(conversations: list[list[tuple[int, int]]]) -> TokenStore:
    """Conversations of (user tokens, answer tokens): 1 5… 2 9 1 6… 2 9, with the 6… 2 for targets."""
    tokens, weights, lengths = [], [], []
    for turns in conversations:
        before = len(tokens)
        for question, answer in turns:
            tokens += [1, *[5] * question, 2, 9, 1, *[6] * answer, 2, 9]
            weights += [0] * (question + 4) + [1] * (answer + 1) + [0]
        lengths.append(len(tokens) - before)
    return store_of(lengths, "conversation", tokens, weights)


TURNS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=5)


@given(st.lists(TURNS, min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 60))
@settings(max_examples=200)
def test_conversations_end_with_the_last_answer_that_fits(conversations, max_seq_len, slab):
    store = build_store(conversations)
    documents = np.arange(store.num_documents)[: store.num_documents - 1 or None]
    segments, report = segments_in_parts(store, documents, max_seq_len, slab)

    expected, cut, dropped, lost = [], 0, 0, 0
    for d in documents:
        start, end = store.offsets[d], store.offsets[d + 1]
        ends = [p for p in range(start, end) if store.tokens[p] == EOS and store.weights[p]]
        fitting = [p for p in ends if p - start <= max_seq_len]
        kept_to = fitting[-1] if fitting else start
        if fitting:
            expected.append((d, start, kept_to - start))
        lost += store.weights[kept_to + 1 : end].sum()
        cut += bool(fitting) and fitting[-1] != ends[-1]
        dropped += not fitting
    assert stretches_of(store, segments) == expected
    assert (report.documents, report.cut, report.dropped) == (len(documents), cut, dropped)
    assert report.lost_target_tokens == lost


def test_conversations_without_any_answer_are_dropped():
    store = build_store([[(3, 3)], [(2, 2)]])
    store.weights[:] = 0
    segments, report = segments_in_parts(store, np.arange(2), 64)
    assert (len(segments), report.dropped) == (0, 2)
    segments, report = segments_in_parts(store, np.arange(0), 64)
    assert (len(segments), report.documents) == (0, 0)


def test_a_conversation_longer_than_a_small_number_can_say():
    store = build_store([[(1, 70_000)], [(1, 200)]])
    for max_seq_len, kept in ((255, [205]), (300, [205]), (65_535, [205]), (80_000, [205, 70_005])):
        segments, _ = segments_in_parts(store, all_documents(store), max_seq_len)
        assert segments.lengths.tolist() == kept


# ---- Pairs ----


@given(st.lists(st.integers(2, 30), min_size=2, max_size=40), st.integers(2, 60), st.integers(0, 20))
@settings(max_examples=100)
def test_pairs_are_kept_whole_or_dropped(lengths, max_seq_len, left_out):
    lengths = lengths[: len(lengths) // 2 * 2]
    store = store_of(lengths, "preference", weights=[1] * sum(lengths))
    left_out = 2 * left_out % len(lengths)
    documents = AllBut(len(lengths), np.array([left_out, left_out + 1]))
    segments, report = segments_in_parts(store, documents, max_seq_len)
    chosen = [d for d in range(0, len(lengths), 2) if d != left_out]
    positions = {d: lengths[d] + lengths[d + 1] - 2 for d in chosen}
    expected = [(d, store.offsets[d], n) for d, n in positions.items() if n <= max_seq_len]
    assert stretches_of(store, segments) == expected
    assert (report.documents, report.dropped) == (len(chosen), len(chosen) - len(expected))


# ---- Real data ----


@pytest.mark.parametrize("max_seq_len", [340, 512, 1024])
def test_real_text_leaves_little_padding(shared_data, tokenizer, tmp_path, max_seq_len):
    store = prepare(shared_data / "pretrain_val.jsonl.gz", "pretrain", tokenizer, cache_dir=tmp_path)
    segments, _ = make_segments(store, all_documents(store), max_seq_len, EOS)
    assert segments.num_positions == store.meta["num_target_tokens"]
    assert segments.num_positions >= 0.98 * max_seq_len * len(pack(segments.counts, max_seq_len))


@pytest.mark.parametrize("max_seq_len", [512, 1024])
def test_real_conversations_leave_little_padding(shared_data, tokenizer, tmp_path, max_seq_len):
    store = prepare(shared_data / "sft_mini_512.jsonl.gz", "conversation", tokenizer, cache_dir=tmp_path)
    segments, report = make_segments(store, all_documents(store), max_seq_len, EOS)
    assert segments.num_positions >= 0.98 * max_seq_len * len(pack(segments.counts, max_seq_len))
    ends = store.tokens[segments.starts + segments.lengths]
    assert (ends == EOS).all()
    kept = sum(
        int(store.weights[start : start + length + 1].sum())
        for start, length in zip(segments.starts, segments.lengths, strict=True)
    )
    assert kept + report.lost_target_tokens == store.meta["num_target_tokens"]


@pytest.mark.parametrize("copies", [1, 8])
def test_memory_stays_that_of_the_segments(copies):
    """Of documents eight times as many, only what is kept takes eight times as much."""
    lengths = np.random.default_rng(0).integers(2, 700, 50_000 * copies).tolist()
    store = store_of(lengths)
    tracemalloc.start()
    segments, _ = make_segments(store, all_documents(store), 512, EOS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert segments.starts.dtype == np.uint32
    assert peak - segments.starts.nbytes < 6e6
