"""Preference pairs: what is a target, and rows that hold whole pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from minimind.data.batches import PairBatch, PairDataset
from minimind.data.holdout import split_holdout
from minimind.data.prepare import prepare
from minimind.data.store import TokenStore
from minimind.errors import UserError


def pair(n: int) -> dict:
    """A pair whose length depends on `n`; every third one has an earlier answer in its prompt."""
    prompt = [{"role": "user", "content": f"数到{n}"}]
    if n % 3 == 0:
        prompt = [
            *prompt,
            {"role": "assistant", "content": "从几开始？"},
            {"role": "user", "content": "从零"},
        ]
    counted = "、".join(map(str, range(n % 20 + 1)))
    chosen, rejected = (
        [*prompt, {"role": "assistant", "content": c}] for c in (counted, "不会" * (n % 4 + 1))
    )
    return {"chosen": chosen, "rejected": rejected}


PAIRS = [pair(n) for n in range(50)]


@pytest.fixture
def store(write_lines, tokenizer) -> TokenStore:
    return prepare(write_lines(*PAIRS), "preference", tokenizer, progress=False)


def dataset(store: TokenStore, max_seq_len: int = 160, **options) -> PairDataset:
    data = PairDataset(store, max_seq_len, **{"seed": 3, "pad_id": 0, "eos_id": 2, **options})
    data.reference = torch.arange(store.num_documents, dtype=torch.float32).view(-1, 2)
    return data


def answers_of(batch: PairBatch) -> dict[tuple[int, int], list[int]]:
    """The target tokens of each (number of the pair in the store, side)."""
    targets = batch.labels.flatten()[batch.targets_at]
    found: dict[tuple[int, int], list[int]] = {}
    for token, side in zip(targets.tolist(), batch.sides.tolist(), strict=True):
        found.setdefault((batch.pairs[side // 2].item(), side % 2), []).append(token)
    return found


def test_only_the_last_answer_and_its_end_are_targets(store, tokenizer):
    for i, messages in enumerate(PAIRS[n][side] for n in range(50) for side in ("chosen", "rejected")):
        weights = store.weights[store.offsets[i] : store.offsets[i + 1]]
        text = tokenizer.decode(store.document(i)[weights > 0], skip_special_tokens=False)
        assert text == messages[-1]["content"] + "<|im_end|>"
        assert set(weights.tolist()) == {0, 1}


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_holds_every_pair_once_and_whole(store, epoch):
    data = dataset(store)
    batch = data.batch(epoch, 0, data.num_rows)
    assert sorted(batch.pairs.tolist()) == list(range(50))
    assert data.num_rows < 50
    column, row = 0, 0
    for number, (row_of, in_row) in zip(batch.pairs.tolist(), places(batch), strict=True):
        column = column if row_of == row else 0
        row = row_of
        for side in (0, 1):
            tokens = store.document(2 * number + side)
            here = np.s_[row, column : column + len(tokens) - 1]
            assert batch.input_ids[here].tolist() == tokens[:-1].tolist()
            assert batch.labels[here].tolist() == tokens[1:].tolist()
            assert batch.position_ids[here].tolist() == list(range(len(tokens) - 1))
            assert set(batch.document_ids[here].tolist()) == {2 * in_row + side}
            column += len(tokens) - 1


def places(batch: PairBatch) -> list[tuple[int, int]]:
    """The row of each pair, and its number within the row."""
    return [(row, i) for row, count in enumerate(batch.pairs_in_row.tolist()) for i in range(count)]


def test_every_target_knows_its_answer_and_every_pair_its_reference(store, tokenizer):
    data = dataset(store)
    seen = Counter()
    for start in range(0, data.num_rows, 4):
        batch = data.batch(1, start, 4)
        assert batch.row_units.tolist() == batch.pairs_in_row.tolist()
        assert batch.row_units.sum() == len(batch.pairs)
        assert torch.equal(batch.reference, torch.stack([2 * batch.pairs, 2 * batch.pairs + 1], 1).float())
        for (number, side), tokens in answers_of(batch).items():
            seen[number, side] += 1
            answer = PAIRS[number][("chosen", "rejected")[side]][-1]["content"]
            assert tokens == [*tokenizer.encode(answer), 2]
    assert set(seen.values()) == {1}
    assert len(seen) == 100


def test_rows_of_padding_have_no_pairs(store):
    data = dataset(store)
    short = data.batch(0, data.num_rows - 1, 3)
    full = data.batch(0, data.num_rows - 1, 3, min_rows=3)
    assert full.pairs_in_row.tolist() == [*short.pairs_in_row.tolist(), 0, 0]
    assert answers_of(full) == answers_of(short)
    empty = data.batch(0, data.num_rows, 3, min_rows=1)
    assert (len(empty.pairs), len(empty.sides), empty.reference.shape) == (0, 0, (0, 2))
    assert empty.to("cpu").pairs_in_row.tolist() == [0]


def test_a_pair_that_does_not_fit_is_dropped_whole(store):
    lengths = (np.diff(store.offsets) - 1).reshape(-1, 2).sum(axis=1)
    data = dataset(store, 64)
    batch = data.batch(0, 0, data.num_rows)
    assert sorted(batch.pairs.tolist()) == np.flatnonzero(lengths <= 64).tolist()
    assert (data.report.documents, data.report.dropped) == (50, (lengths > 64).sum())
    assert 0 < data.report.dropped < 50
    assert dataset(store, 8).num_rows == 0


def test_source_lines_name_the_pairs_of_a_row(store):
    data = dataset(store)
    assert data.source_lines(1, 2) == sorted((data.batch(1, 2, 1).pairs + 1).tolist())


def test_holding_out_keeps_pairs_together(store):
    training, held = split_holdout(store, fraction=0.1)
    assert len(held) == 10
    assert (held[::2] % 2 == 0).all()
    assert (held[1::2] == held[::2] + 1).all()
    pairs = [dataset(store, documents=part).batch(0, 0, 50).pairs.tolist() for part in (training, held)]
    assert sorted(pairs[0] + pairs[1]) == list(range(50))
    assert sorted(pairs[1]) == (held[::2] // 2).tolist()


def test_an_answer_without_a_target_is_refused(store):
    weights = store.weights.copy()
    weights[store.offsets[15] : store.offsets[16]] = 0
    with pytest.raises(UserError, match=r"data\.jsonl:8: the chat template .* leaves out an answer"):
        dataset(replace(store, weights=weights))
