"""The tokenised store: what is in it, when it is found again, and what is said about it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from store_samples import CHATS, PAIRS, TEXTS, arrays, big_file

from minimind.data import prepare as prepare_module
from minimind.data import store as store_module
from minimind.data.lines import read_blocks
from minimind.data.prepare import prepare
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer


def assert_same(one: TokenStore, other: TokenStore) -> None:
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


def test_pretraining_documents(write_lines, tokenizer):
    path = write_lines(b"", *TEXTS)
    store = prepare(path, "pretrain", tokenizer)
    assert (store.kind, store.weights, store.tokens.dtype) == ("pretrain", None, np.uint16)
    documents = [tokenizer.encode_document(record["text"]) for record in TEXTS]
    assert [store.document(i).tolist() for i in range(store.num_documents)] == documents
    assert store.lines.tolist() == [2, 3, 4, 5]
    assert store.offsets.tolist() == [0, *itertools.accumulate(map(len, documents))]
    assert store.fingerprints.tolist() == [zlib.crc32(np.array(ids, "<u2")) for ids in documents]
    assert store.meta["num_tokens"] == store.num_tokens == sum(map(len, documents))
    assert store.meta["num_target_tokens"] == store.num_tokens - 4
    assert store.meta["utf8_bytes"] == sum(len(record["text"].encode()) for record in TEXTS)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 0


def test_conversations(write_lines, tokenizer):
    store = prepare(write_lines(*CHATS), "conversation", tokenizer)
    for i, chat in enumerate(CHATS):
        ids, mask = tokenizer.encode_chat(chat["conversations"])
        assert store.document(i).tolist() == ids
        assert store.weights[store.offsets[i] : store.offsets[i + 1]].tolist() == mask
    assert store.meta["num_target_tokens"] == store.weights.sum() > 0
    assert store.meta["utf8_bytes"] == len("1+1=?2简短回答。你好你好！再见再见。".encode())


def test_a_preference_pair_is_two_documents(write_lines, tokenizer):
    store = prepare(write_lines(*PAIRS), "preference", tokenizer)
    documents = [tokenizer.encode_chat(pair[side])[0] for pair in PAIRS for side in ("chosen", "rejected")]
    assert [store.document(i).tolist() for i in range(store.num_documents)] == documents
    assert store.lines.tolist() == [1, 1, 2, 2]
    a, b, c, d = store.fingerprints.tolist()
    assert a == b != c == d


THOUGHT = "<think>\nI think of <b>1</b> answer, 想.\n</think>\n<answer>\nanswer<a>\n</answer>"
TERSE = "<think></think><answer>2</answer>\n"


@pytest.mark.parametrize("name", ["shipped", "minimind2"])
def test_tags_of_reasoning_are_a_class_of_their_own(write_lines, shared_data, name):
    """Also where a tokenizer joins a tag's `>` to the newline, or cuts `think` in two."""
    tokenizer = Tokenizer.load(None if name == "shipped" else shared_data / "minimind2_tokenizer")
    asked = {"role": "user", "content": "<think> </answer>"}
    answers = [{"role": "assistant", "content": content} for content in (THOUGHT, TERSE)]
    messages = [{**asked, "role": "system"}, asked, answers[0], asked, answers[1]]
    store = prepare(write_lines({"conversations": messages}), "reasoning", tokenizer, num_workers=0)

    ids, mask = tokenizer.encode_chat(messages)
    assert store.tokens.tolist() == ids
    texts = THOUGHT + TERSE
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        texts = texts.replace(tag, "\0" * len(tag))
    rest = texts.encode()
    for token, target, weight in zip(ids, mask, store.weights, strict=True):
        length = len(tokenizer.token_bytes[token]) * target
        assert weight == (2 if b"\0" in rest[:length] else target)
        rest = rest[length:]
    assert rest == b""


def test_a_large_vocabulary_takes_four_bytes(write_lines, tokenizer):
    class Large(Tokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return [69_999]

    large = Large.__new__(Large)
    large.__dict__.update({**vars(tokenizer), "vocab_size": 70_000, "_bulk_encoder": None})
    store = prepare(write_lines(*TEXTS), "pretrain", large, num_workers=0)
    assert store.tokens.dtype == np.uint32
    assert store.document(0).tolist() == [1, 69_999, 2]


def test_workers_give_the_same_as_none(tmp_path, tokenizer):
    path = big_file(tmp_path, 2.5)
    alone = prepare(path, "pretrain", tokenizer, num_workers=0, cache_dir=tmp_path / "a")
    together = prepare(path, "pretrain", tokenizer, num_workers=2, cache_dir=tmp_path / "b")
    assert alone.num_documents > 1000
    assert_same(alone, together)
    assert len(list(read_blocks(path))) > 2
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    assert alone.lines.tolist() == list(range(1, len(texts) + 1))
    for i in range(0, len(texts), 50):
        assert alone.document(i).tolist() == tokenizer.encode_document(texts[i])


def test_gzip_gives_the_same(write_lines, tokenizer, tmp_path):
    path = write_lines(*CHATS)
    zipped = tmp_path / "data.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert_same(prepare(path, "conversation", tokenizer), prepare(zipped, "conversation", tokenizer))


def test_found_again_by_content_kind_tokenizer_and_version(
    write_lines, tokenizer, tmp_path, builds, monkeypatch
):
    path = write_lines(*TEXTS)
    first = prepare(path, "pretrain", tokenizer)
    assert first.folder.parent == path.parent / ".cache"
    assert_same(prepare(path, "pretrain", tokenizer), first)
    path.touch()
    path = path.rename(tmp_path / "other_name.jsonl")
    prepare(path, "pretrain", tokenizer)
    assert len(builds) == 1

    path.write_bytes(path.read_bytes().replace(b"Hello", b"HELLO"))
    assert "HELLO" in tokenizer.decode(prepare(path, "pretrain", tokenizer).document(2))
    assert len(builds) == 2

    folder = shutil.copytree(tokenizer.path, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    prepare(path, "pretrain", Tokenizer.load(folder))
    assert len(builds) == 3

    path.write_bytes(path.read_bytes() + json.dumps(CHATS[0]).encode())
    with pytest.raises(UserError, match="text: missing"):
        prepare(path, "pretrain", tokenizer)
    with pytest.raises(UserError, match="conversations: missing"):
        prepare(path, "conversation", tokenizer)
    prepare(path, "pretrain", tokenizer, on_bad_record="skip")
    prepare(path, "conversation", tokenizer, on_bad_record="skip")
    assert len(set(builds)) == 5

    for module in (prepare_module, store_module):
        monkeypatch.setattr(module, "FORMAT_VERSION", store_module.FORMAT_VERSION + 1)
    prepare(path, "pretrain", tokenizer, on_bad_record="skip")
    assert len(set(builds)) == 6


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files whose bytes were hashed; none counts as too young to be remembered."""
    files = []
    digest = prepare_module.hashlib.file_digest
    monkeypatch.setattr(
        prepare_module.hashlib,
        "file_digest",
        lambda file, kind: (files.append(file.name), digest(file, kind))[1],
    )
    monkeypatch.setattr(prepare_module, "CLOCK_RESOLUTION", -1.0)
    return files


def test_a_file_is_hashed_again_only_when_it_was_touched(write_lines, tokenizer, hashed, builds):
    path = write_lines(*TEXTS)
    first = prepare(path, "pretrain", tokenizer)
    assert prepare(path, "pretrain", tokenizer).folder == first.folder
    assert len(hashed) == 1

    # The same length, and the time of the last change set back.
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Hello", b"HELLO"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert "HELLO" in tokenizer.decode(prepare(path, "pretrain", tokenizer).document(2))
    assert (len(hashed), len(builds)) == (2, 2)

    for damaged in (b"", b"[]", b"{"):
        next((path.parent / ".cache" / "hashes").iterdir()).write_bytes(damaged)
        prepare(path, "pretrain", tokenizer)
    assert (len(hashed), len(builds)) == (5, 2)


def test_a_file_written_just_now_may_still_change_unseen(write_lines, tokenizer, hashed, monkeypatch):
    monkeypatch.setattr(prepare_module, "CLOCK_RESOLUTION", 60.0)
    path = write_lines(*TEXTS)
    prepare(path, "pretrain", tokenizer)
    prepare(path, "pretrain", tokenizer)
    assert len(hashed) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_records_stop_and_nothing_is_kept(write_lines, tokenizer, num_workers):
    path = write_lines(*TEXTS, b"{", {"text": 1})
    with pytest.raises(UserError, match=r"data\.jsonl:5: line: broken JSON"):
        prepare(path, "pretrain", tokenizer, num_workers=num_workers)
    assert [entry.suffix for entry in (path.parent / ".cache").iterdir()] == [".lock"]


def test_skipped_records_are_counted_and_listed(write_lines, tokenizer, capsys):
    path = write_lines(b"\xef\xbb\xbf" + json.dumps(TEXTS[0]).encode(), b"{", TEXTS[1], {"text": 1}, TEXTS[2])
    for _ in range(2):  # built, and then from the cache
        store = prepare(path, "pretrain", tokenizer, on_bad_record="skip")
        assert store.lines.tolist() == [1, 3, 5]
        assert store.meta["skipped"] == 2
        listed = [json.loads(line) for line in (store.folder / "bad_records.jsonl").open()]
        assert [(bad["line"], bad["field"], bad["used"]) for bad in listed] == [
            (1, "file", True),
            (2, "line", False),
            (4, "text", False),
        ]
        said = capsys.readouterr().err
        assert f"{path}: 2 bad records skipped, 3 documents used" in said
        assert str(store.folder / "bad_records.jsonl") in said
        prepare(path, "pretrain", tokenizer, on_bad_record="skip", progress=False)
        assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"data\.jsonl:1: file: begins with a byte order mark"):
        prepare(path, "pretrain", tokenizer)  # the store is there, but was made by skipping


def test_files_without_a_record(write_lines, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        prepare(tmp_path / "nowhere.jsonl", "pretrain", tokenizer)
    for path in (write_lines(), write_lines(b"{")):
        with pytest.raises(UserError, match="no usable record"):
            prepare(path, "pretrain", tokenizer, on_bad_record="skip")
    assert not list((tmp_path / ".cache").glob("pretrain-*/"))


def test_what_was_done_is_said_in_one_line(write_lines, tokenizer, capsys):
    store = prepare(write_lines(*TEXTS), "pretrain", tokenizer)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"4 documents, {store.num_tokens} tokens from 0.0 MB of text at " in said.err


def test_a_terminal_shows_a_bar_with_the_rate(write_lines, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    prepare(write_lines(*TEXTS), "pretrain", tokenizer, progress=False)
    assert capsys.readouterr().err == ""
    prepare(write_lines(*TEXTS[:3]), "pretrain", tokenizer)
    said = capsys.readouterr().err
    assert "tokenising data.jsonl" in said
    assert "100%" in said
    assert "MB/s of text" in said
