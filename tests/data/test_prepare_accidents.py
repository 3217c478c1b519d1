"""What no accident may do to a tokenised store: damage, full disks, kills, and several processes at once."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from store_samples import CHATS, TEXTS, arrays, big_file

from minimind.data import encode
from minimind.data import prepare as prepare_module
from minimind.data.lines import Block
from minimind.data.prepare import prepare
from minimind.data.store import StoreWriter, TokenStore
from minimind.errors import UserError

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
