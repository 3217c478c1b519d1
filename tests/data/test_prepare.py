"""The tokenised store: what is in it, when it is found again, and what no accident may do to it."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from minimind.data import encode
from minimind.data import prepare as prepare_module
from minimind.data import store as store_module
from minimind.data.prepare import prepare
from minimind.data.records import Block, read_blocks
from minimind.data.store import StoreWriter, TokenStore
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

TEXTS = [{"text": text} for text in ("床前明月光，疑是地上霜。", "a", "Hello, world!\n<|im_end|>", "😀" * 50)]
CHATS = [
    {"conversations": [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]},
    {
        "conversations": [
            {"role": "system", "content": "简短回答。"},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "你好！"},
            {"role": "user", "content": "再见"},
            {"role": "assistant", "content": "再见。"},
        ]
    },
]
PAIRS = [
    {
        "chosen": chat["conversations"],
        "rejected": [*chat["conversations"][:-1], {"role": "assistant", "content": "?"}],
    }
    for chat in CHATS
]

# Runs `prepare` on argv[1] in a process of its own, two workers, and prints the number of tokens.
SCRIPT = """
import sys
from minimind.data.prepare import prepare
from minimind.tokenizer import Tokenizer
print(prepare(sys.argv[1], "pretrain", Tokenizer.load(), num_workers=2).num_tokens)
"""


def start(path: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def big_file(folder: Path, megabytes: float) -> Path:
    """Chinese text that is not the same on any two lines."""
    letters = random.Random(0)
    path = folder / "big.jsonl"
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            text = "".join(chr(0x4E00 + int(letters.expovariate(0.01)) % 3000) for _ in range(400))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def arrays(store: TokenStore) -> dict[str, np.ndarray | None]:
    return {name: getattr(store, name) for name in ("tokens", "weights", "offsets", "lines", "fingerprints")}


def assert_same(one: TokenStore, other: TokenStore) -> None:
    for name, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The stores that were built, not found."""
    built = []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, "_build", lambda *args: (built.append(args[2]), build(*args)))
    return built


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

        def encode_batch(self, texts):
            return [[69_999] for _ in texts]

    large = Large.__new__(Large)
    large.__dict__.update({**vars(tokenizer), "vocab_size": 70_000})
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


@pytest.mark.parametrize(
    "name", ["tokens.bin", "weights.bin", "offsets.bin", "lines.bin", "fingerprints.bin"]
)
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_store_is_built_again(write_lines, tokenizer, builds, name, damage):
    path = write_lines(*CHATS)
    before = arrays(prepare(path, "conversation", tokenizer))
    before = {key: array.copy() for key, array in before.items()}
    file = builds[0] / name
    file.write_bytes(file.read_bytes()[:-1]) if damage == "truncate" else file.unlink()
    after = prepare(path, "conversation", tokenizer)
    assert len(builds) == 2
    for key, array in before.items():
        np.testing.assert_array_equal(array, arrays(after)[key])


@pytest.mark.parametrize("meta", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_description_is_built_again(write_lines, tokenizer, builds, meta):
    path = write_lines(*TEXTS)
    prepare(path, "pretrain", tokenizer)
    (builds[0] / "meta.json").write_bytes(meta)
    assert prepare(path, "pretrain", tokenizer).num_documents == 4
    assert len(builds) == 2


def test_a_full_disk_is_said_and_leaves_nothing(write_lines, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_lines(*TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", full)
        with pytest.raises(UserError, match="the disk is full"):
            prepare(path, "pretrain", tokenizer)
    assert [entry.suffix for entry in (path.parent / ".cache").iterdir()] == [".lock"]
    assert prepare(path, "pretrain", tokenizer).num_documents == 4


def test_a_file_that_grows_while_it_is_read_is_refused(write_lines, tokenizer, monkeypatch):
    path = write_lines(*TEXTS)

    def grow(writer, block, add=StoreWriter.add):
        with path.open("ab") as file:
            file.write(b'{"text": "late"}\n')
        add(writer, block)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", grow)
        with pytest.raises(UserError, match="changed while it was read"):
            prepare(path, "pretrain", tokenizer)
    assert prepare(path, "pretrain", tokenizer).num_documents == 5


def test_a_folder_that_cannot_be_written_falls_back_to_home(write_lines, tokenizer, tmp_path, monkeypatch):
    path = write_lines(*TEXTS)
    (path.parent / ".cache").write_bytes(b"a file where the folder should be")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare(path, "pretrain", tokenizer).folder.parent == tmp_path / "home" / ".cache" / "minimind"
    with pytest.raises(UserError, match="cannot be written"):
        prepare(path, "pretrain", tokenizer, cache_dir=path)


def test_a_killed_worker_ends_the_work_with_a_sentence(tmp_path, tokenizer, monkeypatch):
    started = []
    begin = encode._Worker.__init__
    monkeypatch.setattr(
        encode._Worker, "__init__", lambda self, *args: (started.append(self), begin(self, *args))[1]
    )

    def blocks():
        yield Block(1, json.dumps(TEXTS[0]).encode(), 0)
        os.kill(started[0]._process.pid, signal.SIGKILL)
        for _ in range(4):
            yield Block(1, json.dumps(TEXTS[0]).encode(), 0)

    with pytest.raises(UserError, match="killed by signal 9"):
        list(encode.encode_blocks(blocks(), "pretrain", "file", tokenizer, 1))
    assert started[0]._process.returncode == -signal.SIGKILL


def test_two_processes_build_once(tmp_path, tokenizer):
    path = big_file(tmp_path, 1.5)
    processes = [start(path) for _ in range(2)]
    (out, said), (other_out, other_said) = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said + other_said
    assert int(out) == int(other_out) > 100_000
    assert (said + other_said).count(" documents, ") == 1


def test_the_second_process_says_that_it_waits(write_lines, tokenizer, tmp_path):
    path = write_lines(*TEXTS)
    folder = prepare(path, "pretrain", tokenizer).folder
    shutil.rmtree(folder)
    with prepare_module._lock(folder, None):
        process = start(path)
        assert process.stderr.readline() == f"waiting for another process to tokenise {path}\n"
        time.sleep(0.2)
        assert process.poll() is None
    assert int(process.communicate(timeout=60)[0]) > 0


def test_a_killed_build_leaves_nothing_that_loads(tmp_path, tokenizer):
    path = big_file(tmp_path, 4)
    documents = sum(1 for _ in path.open(encoding="utf-8"))
    cache = tmp_path / ".cache"
    moments = random.Random(1)
    interrupted = 0
    for _ in range(6):
        process = start(path)
        while not list(cache.glob("*.tmp")):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.wait()
        interrupted += bool(list(cache.glob("*.tmp")))
        for folder in cache.glob("pretrain-*[0-9a-f]/"):  # it was complete before the kill
            assert TokenStore.open(folder).num_documents == documents
            shutil.rmtree(folder)
    assert interrupted >= 3
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n')
    prepare(other, "pretrain", tokenizer)  # clears up after others, too
    assert not list(cache.glob("*.tmp"))
    assert prepare(path, "pretrain", tokenizer).num_documents == documents
