"""Batches against a plain reading of the documents, the held-out choice, and reading ahead."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.data.batches import Batch, PackedDataset, PairDataset, prefetch
from minimind.data.encode import EncodedBlock
from minimind.data.holdout import split_holdout
from minimind.data.prepare import prepare
from minimind.data.store import StoreWriter, TokenStore

TEXTS = [{"text": "白日依山尽，黄河入海流。" * (n % 7 + 1) + str(n)} for n in range(40)]
CHATS = [
    {
        "conversations": [
            {"role": "user", "content": "数到" + str(n)},
            {"role": "assistant", "content": "、".join(map(str, range(n + 1)))},
            {"role": "user", "content": "谢谢"},
            {"role": "assistant", "content": "不客气" * (n % 5 + 1)},
        ]
    }
    for n in range(40)
]


@pytest.fixture
def texts(write_lines, tokenizer) -> TokenStore:
    return prepare(write_lines(*TEXTS), "pretrain", tokenizer, progress=False)


@pytest.fixture
def chats(write_lines, tokenizer) -> TokenStore:
    return prepare(write_lines(*CHATS), "conversation", tokenizer, progress=False)


def dataset(store: TokenStore, max_seq_len: int = 64, **options) -> PackedDataset:
    return PackedDataset(store, max_seq_len, **{"seed": 3, "pad_id": 0, "eos_id": 2, **options})


def segments_of(batch: Batch) -> list[dict[str, list]]:
    """The parts of a batch that lie between borders of documents, checking what all rows must obey."""
    found = []
    for row in range(len(batch.input_ids)):
        ids = batch.document_ids[row]
        real = ids >= 0
        assert real[: real.sum()].all(), "padding is at the end"
        assert ids[real].tolist() == sorted(ids[real].tolist())
        for name, value in (("input_ids", 0), ("labels", 0), ("loss_mask", 0), ("position_ids", 0)):
            assert (getattr(batch, name)[row][~real] == value).all()
        assert sorted(set(ids[real].tolist())) == list(range(int(ids.max()) + 1))
        for number in range(int(ids.max()) + 1):
            here = ids == number
            assert batch.position_ids[row][here].tolist() == list(range(int(here.sum())))
            names = ("input_ids", "labels", "loss_mask")
            found.append({name: getattr(batch, name)[row][here].tolist() for name in names})
    return found


def test_rows_of_texts_are_the_documents(texts):
    data = dataset(texts, 512)
    batch = data.batch(0, 0, data.num_rows)
    found = Counter(tuple(part["input_ids"] + part["labels"][-1:]) for part in segments_of(batch))
    assert found == Counter(tuple(texts.document(i).tolist()) for i in range(40))
    for part in segments_of(batch):
        assert part["labels"][:-1] == part["input_ids"][1:]
        assert set(part["loss_mask"]) == {1.0}
    assert batch.num_target_tokens == texts.meta["num_target_tokens"]
    padding = (batch.document_ids < 0).float().mean().item()
    assert padding == pytest.approx(data.padding_fraction, abs=1e-6)


def test_rows_of_conversations_end_with_answers_and_mask_the_rest(chats, tokenizer):
    data = dataset(chats, 128)
    expected = Counter()
    for chat in CHATS:
        ids, mask = tokenizer.encode_chat(chat["conversations"])
        ends = [p for p in range(len(ids)) if ids[p] == 2 and mask[p] and p <= 128]
        if ends:
            expected[
                (tuple(ids[: ends[-1]]), tuple(ids[1 : ends[-1] + 1]), tuple(mask[1 : ends[-1] + 1]))
            ] += 1
    found = segments_of(data.batch(5, 0, data.num_rows))
    assert Counter(tuple(map(tuple, part.values())) for part in found) == expected
    assert 0 < data.report.cut + data.report.dropped < 40


def test_targets_are_found_by_their_flat_indices(chats):
    batch = dataset(chats, 128).batch(0, 1, 3)
    mask = batch.loss_mask.flatten()
    assert batch.targets_at.tolist() == [i for i, weight in enumerate(mask.tolist()) if weight]
    assert 0 < batch.num_target_tokens == len(batch.targets_at) < mask.numel()


def test_rows_of_padding_make_up_a_shape(texts):
    data = dataset(texts)
    short = data.batch(0, data.num_rows - 1, 4)
    full = data.batch(0, data.num_rows - 1, 4, min_rows=4)
    assert (len(short.input_ids), len(full.input_ids)) == (1, 4)
    assert torch.equal(full.input_ids[:1], short.input_ids)
    assert (full.document_ids[1:] == -1).all()
    assert full.num_target_tokens == short.num_target_tokens
    assert len(data.batch(0, data.num_rows, 4, min_rows=2).input_ids) == 2
    assert len(data.batch(0, 0, 4, min_rows=2).input_ids) == 4


def test_the_weight_of_tags_reaches_the_loss_mask(chats):
    weights = chats.weights.copy()
    weights[weights > 0] = 2
    batch = dataset(replace(chats, weights=weights), 128, tag_weight=10).batch(0, 0, 2)
    assert set(batch.loss_mask.unique().tolist()) == {0.0, 10.0}
    assert batch.num_target_tokens == dataset(chats, 128).batch(0, 0, 2).num_target_tokens


def test_shapes_and_types(texts):
    batch = dataset(texts).batch(0, 0, 3)
    types = {field.name: getattr(batch, field.name).dtype for field in fields(Batch)}
    assert types == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
        "targets_at": torch.int64,
    }
    assert {tuple(getattr(batch, name).shape) for name in types if name != "targets_at"} == {(3, 64)}
    moved = batch.to("meta", non_blocking=True)
    assert {getattr(moved, name).device.type for name in types} == {"meta"}


def test_any_row_of_any_epoch_at_once(texts):
    data = dataset(texts)
    rows = [data.batch(2, row, 1) for row in range(data.num_rows)]
    fresh = dataset(texts)
    batch = fresh.batch(2, 4, 5)
    for field in fields(Batch):
        whole = torch.cat([getattr(row, field.name) for row in rows[4:9]])
        if field.name != "targets_at":
            assert torch.equal(getattr(batch, field.name), whole)
    assert len(fresh.batch(2, data.num_rows - 2, 5).input_ids) == 2
    assert len(fresh.batch(2, data.num_rows, 5).input_ids) == 0
    assert not torch.equal(fresh.batch(3, 4, 5).input_ids, batch.input_ids)
    assert not torch.equal(dataset(texts, seed=4).batch(2, 4, 5).input_ids, batch.input_ids)


def test_source_lines_name_the_records_of_a_row(write_lines, tokenizer):
    records = [line for text in TEXTS for line in (b"", text)]
    store = prepare(write_lines(*records), "pretrain", tokenizer, progress=False)
    data = dataset(store, 512)
    row = data.batch(1, 1, 1)
    texts = [text["text"] for text in TEXTS]
    numbers = [texts.index(tokenizer.decode(part["input_ids"])) for part in segments_of(row)]
    assert len(numbers) > 2
    assert data.source_lines(1, 1) == sorted(2 * n + 2 for n in numbers)


def test_only_the_chosen_documents(texts):
    documents = np.array([3, 5, 8])
    data = dataset(texts, 512, documents=documents)
    found = [part["input_ids"] for part in segments_of(data.batch(0, 0, data.num_rows))]
    assert sorted(found) == sorted(texts.document(i).tolist()[:-1] for i in documents)
    assert data.report.documents == 3


def test_no_documents_no_rows(texts, chats):
    for store in (texts, chats):
        data = dataset(store, documents=np.arange(0))
        assert (data.num_rows, data.padding_fraction) == (0, 1.0)


def resident(folder: Path) -> int:
    """Bytes of the files in `folder` that this process has in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is in memory")
@pytest.mark.parametrize("kind", ["pretrain", "conversation", "preference"])
def test_no_page_of_the_store_stays_in_memory(tmp_path, kind):
    """A run holds as much whatever the size of its file."""
    documents, tokens = 4000, 1000
    writer = StoreWriter(tmp_path / "store", {"kind": kind, "vocab_size": 6400})
    ends = np.arange(documents * tokens) % tokens == tokens - 1
    block = EncodedBlock(
        tokens=np.where(ends, 2, 5).astype(np.uint16),
        weights=None if kind == "pretrain" else np.ones(documents * tokens, np.uint8),
        lengths=np.full(documents, tokens),
        lines=np.arange(documents),
        fingerprints=np.arange(documents, dtype=np.uint32).repeat(2)[:documents],
        utf8_bytes=0,
        bad_records=[],
        position=0,
    )
    writer.add(block)
    writer.finish()
    store = TokenStore.open(tmp_path / "store")
    assert store.tokens.max() == 5
    assert resident(tmp_path) >= store.tokens.nbytes == 8_000_000
    store.release()
    for part in split_holdout(store):
        rows = PairDataset if kind == "preference" else PackedDataset
        data = rows(store, 2000, seed=0, pad_id=0, eos_id=2, documents=part)
        assert resident(tmp_path) == 0
        for row in range(0, data.num_rows, 200):
            data.batch(0, row, 100)
        assert resident(tmp_path) < 1_000_000
    assert store.tokens[999] == 2


def test_prefetch_gives_everything_in_order_and_stays_ahead():
    made = []

    def source():
        for i in range(20):
            made.append(i)
            yield i

    ahead = prefetch(source(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(ahead) == list(range(1, 20))


def test_prefetch_hands_exceptions_on():
    def source():
        yield 1
        raise RuntimeError("no more")

    ahead = prefetch(source())
    assert next(ahead) == 1
    with pytest.raises(RuntimeError, match="no more"):
        next(ahead)


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("wait_s", [0, 0.1])  # 0.1 s: the thread has all it may make, and waits
def test_prefetch_closed_early_leaves_no_thread(taken, wait_s):
    before = threading.active_count()
    ahead = prefetch(iter(range(100)), depth=2)
    for _ in range(taken):
        next(ahead)
    time.sleep(wait_s)
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    closing.join(timeout=10)
    assert threading.active_count() == before
