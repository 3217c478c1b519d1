"""The benchmark of preparation: all rivals see the same tokens, and a small run says what the file holds."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import namedtuple
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import prepare_speed
from benchmarks.datasets_peer import encoder, joined_and_cut, tokenised
from benchmarks.generated_files import generate, measure
from benchmarks.prepare_speed import ALONE, OURS, PEERS, main
from benchmarks.side_by_side import once_in_own_process
from benchmarks.used_memory import with_peak_memory
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

RECORDS = 300


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    texts = [f"{number}：床前明月光，疑是地上霜。" * (1 + number % 5) for number in range(RECORDS)]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_peers_see_our_tokens(data, tmp_path, kind):
    store = prepare(data, "pretrain", Tokenizer.load(), progress=False)
    documents = tokenised(data, encoder(kind), tmp_path / "cache", num_proc=None)
    ids = list(chain.from_iterable(documents["input_ids"]))
    assert ids == store.tokens.tolist()
    rows = joined_and_cut(documents, 64, num_proc=None)["input_ids"]
    assert list(chain.from_iterable(rows)) == ids[: len(ids) // 64 * 64]


def test_a_small_run(data, tmp_path, monkeypatch):
    one = "datasets.map, tokenizers' threads"  # each takes seconds to start
    monkeypatch.setattr(prepare_speed, "PEERS", {one: PEERS[one]})
    path = tmp_path / "results" / "prepare.json"
    flags = ["--rounds", "1", "--sizes_gb", "0.0001", "0.0002", "--work_dir", str(tmp_path)]
    before = {*tmp_path.iterdir()}
    assert main([str(data), *flags, "--json", str(path)]) == 0
    assert {*tmp_path.iterdir()} - before == {path.parent}  # generated files are gone

    results = json.loads(path.read_text(encoding="utf-8"))
    assert {*results["mb_per_s"]} == {OURS, one, ALONE}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in results["mb_per_s"].values())
    rates = results["mb_per_s"]
    assert results["ratio"] == pytest.approx(rates[OURS][0] / rates[one][0])
    check_sizes(path.with_name("prepare_memory.json"))


def check_sizes(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert [size["file_mb"] for size in results["sizes"]] == pytest.approx([0.1, 0.2], abs=5e-4)
    for size in results["sizes"]:
        assert size["peak_memory_mb"] == max(size["prepare_peak_mb"], size["pack_peak_mb"]) > 20
        assert size["tokens"] > size["documents"] > 0
        assert size["seconds_in_all"] > size["prepare_s"] + size["pack_s"]


def test_the_memory_alone(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_speed, "rivals", None)
    path = tmp_path / "prepare.json"
    flags = ["--rounds", "0", "--sizes_gb", "0.0001", "0.0002", "--work_dir", str(tmp_path)]
    assert main([str(data), *flags, "--json", str(path)]) == 0
    assert not path.exists()
    check_sizes(path.with_name("prepare_memory.json"))
    assert re.search(r"^0 MB: about \d+ s to go$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--rounds -1", "--rounds is -1; it must be 0 or more"), ("--sizes_gb 1 0", "sizes must be above 0")],
)
def test_numbers_that_make_no_sense(data, flags, said):
    with pytest.raises(UserError, match=said):
        main([str(data), *flags.split()])


def test_what_is_counted_is_what_the_file_holds(data, tmp_path):
    result = measure(data, 64, tmp_path / "cache")
    tokenizer = Tokenizer.load()
    texts = [record.text for _, record in read_records(data, "pretrain")]
    assert result["documents"] == len(texts) == RECORDS
    assert result["tokens"] == sum(len(tokenizer.encode_document(text)) for text in texts)
    assert result["text_mb"] == sum(len(text.encode()) for text in texts) / 1e6
    # A document's last token is a label only.
    assert result["rows"] >= (result["tokens"] - result["documents"]) / 64


def test_generated_lines_differ_and_end_at_the_size(data, tmp_path):
    path = generate(data, tmp_path / "generated.jsonl", 2.5 * data.stat().st_size / 1e9)
    lines = path.read_bytes().splitlines()
    assert len(set(lines)) == len(lines) > 2 * RECORDS
    assert 0 <= path.stat().st_size - 2.5 * data.stat().st_size <= max(map(len, lines)) + 1


def use(size: int) -> int:
    block = bytearray(b"x") * size
    time.sleep(0.5)  # it is looked for ten times a second
    return len(block)


def peak_of_use(size: int) -> tuple[int, int]:
    return with_peak_memory(partial(use, size))


def test_memory_that_was_given_back_counts():
    """In processes of their own: what earlier tests have left may go back to the system at any time."""
    _, before = once_in_own_process(peak_of_use, 1)
    length, peak = once_in_own_process(peak_of_use, 200_000_000)
    assert length == 200_000_000
    assert 180e6 < peak - before < 300e6


def test_too_little_room_is_said_before_anything_is_written(data, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10 - 10**9, 10**9))
    monkeypatch.setattr(prepare_speed, "rivals", None)
    with pytest.raises(UserError, match=r"4 GB and its tokens need 6.80 GB, but 1.00 GB are free"):
        main([str(data), "--sizes_gb", "4", "--work_dir", str(tmp_path)])
    with pytest.raises(UserError, match="is no folder"):
        main([str(data), "--work_dir", str(tmp_path / "none")])
