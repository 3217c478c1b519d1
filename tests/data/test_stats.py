"""`minimind data stats`: every figure against one worked out in another way."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimind.cli import main
from minimind.data.batches import PackedDataset, PairDataset
from minimind.data.copies import NEAR, SHINGLE, find_copies
from minimind.data.prepare import prepare
from minimind.data.scripts import LANGUAGES, LanguageCount
from minimind.data.stats import statistics
from minimind.errors import UserError


def chat(*contents: str, key: str = "conversations") -> dict:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {key: messages}


def pair(question: str, good: str, bad: str) -> dict:
    return chat(question, good, key="chosen") | chat(question, bad, key="rejected")


CHATS = [
    chat("你好吗？", "我很好，谢谢。"),
    chat("How are you?", "Fine, thanks."),
    chat("你好吗？", "我很好，谢谢。"),
    chat("1+1=?", "2", "2+2=?", "4", "今天星期几？", "星期三。"),
    chat("こんにちは", "こんにちは、元気ですか"),
]


@pytest.fixture
def stats(tmp_path, capsys):
    """Run the command on a file; returns its figures."""

    def run(path, *flags: str) -> dict:
        picture = tmp_path / "lengths.png"
        found = tmp_path / "figures.json"
        flags = ("--json", str(found), "--picture", str(picture), *flags)
        assert main(["data", "stats", str(path), *flags]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert "lengths as a picture: " in capsys.readouterr().out
        return json.loads(found.read_text(encoding="utf-8"))

    return run


def test_a_few_conversations(stats, write_lines, tokenizer):
    path = write_lines(CHATS[0], b"{", CHATS[1], b"", *CHATS[2:], {"text": "no"}, b"\xff")
    figures = stats(path)
    assert (figures["kind"], figures["records"]) == ("conversation", 5)
    assert figures["bad_records"] == {"count": 3, "lines": [2, 8, 9]}
    assert figures["turns"] == {"1": 4, "3": 1}
    assert figures["copies"] == {"count": 1, "lines": [5]}
    assert figures["near_copies"] == {"count": 0, "lines": []}
    assert figures["language_of_records"] == {"chinese": 3, "english": 1, "other": 1, "none": 0}
    lengths = [len(tokenizer.encode_chat(record["conversations"])[0]) for record in CHATS]
    assert figures["tokens"] == sum(lengths)
    assert figures["lengths"]["max"] == max(lengths)
    assert figures["lengths"]["mean"] == pytest.approx(sum(lengths) / 5)
    assert sum(figures["lengths"]["histogram"].values()) == 5
    contents = [message["content"] for record in CHATS for message in record["conversations"]]
    assert figures["characters"] == sum(map(len, contents))
    assert figures["bytes"] == sum(len(content.encode()) for content in contents)


def test_what_people_see(write_lines, tmp_path, capsys):
    path = write_lines(*CHATS, {"text": "no"})
    assert main(["data", "stats", str(path), "--picture", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out
    assert f"{path}: 5 records of kind conversation" in said
    assert "bad records   1 (line 6)" in said
    assert "turns         1: 4, 2–3: 1" in said
    assert "copies        1 (line 3); nearly copies: none" in said
    assert "rows of 512   1, " in said
    assert "█" * 40 in said
    assert said.endswith(f"lengths as a picture: {tmp_path / 'a.png'}\n")


@pytest.mark.parametrize("max_seq_len", [128, 256])
def test_rows_are_those_of_training(stats, write_lines, tokenizer, max_seq_len):
    rng = random.Random(0)
    words = [chr(0x4E00 + i) for i in range(500)]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(1, 100)))

    files = {
        "pretrain": [{"text": text()} for _ in range(200)],
        "conversation": [chat(*(text() for _ in range(2 * rng.randint(1, 3)))) for _ in range(200)],
        "preference": [pair(text(), text(), text() + "。") for _ in range(200)],
    }
    touched = {}
    for kind, records in files.items():
        path = write_lines(*records, name=f"{kind}.jsonl")
        store = prepare(path, kind, tokenizer, progress=False)
        dataset = (PairDataset if kind == "preference" else PackedDataset)(
            store, max_seq_len, seed=0, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id
        )
        (packed,) = stats(path, "--max_seq_len", str(max_seq_len))["packed"]
        report = dataset.report
        assert packed["rows"] == dataset.num_rows
        assert packed["padding"] == pytest.approx(dataset.padding_fraction)
        assert (packed["split"], packed["cut"], packed["dropped"]) == (
            report.split,
            report.cut,
            report.dropped,
        )
        touched[kind] = packed["split"] + packed["cut"] + packed["dropped"]
        positions = store.num_tokens - store.num_documents
        lost = {
            "pretrain": 0,
            "conversation": report.lost_target_tokens,
            "preference": positions - dataset.num_tokens,
        }
        assert packed["cut_tokens"] == lost[kind]
    assert max_seq_len > 128 or min(touched.values()) > 10


def test_conversations_are_cut_in_slabs_as_in_one(stats, write_lines, monkeypatch):
    path = write_lines(*(chat("问" * i, "答" * (100 - i)) for i in range(1, 100)))
    whole = stats(path, "--max_seq_len", "64")["packed"]
    monkeypatch.setattr("minimind.data.segments.DOCUMENTS_TOGETHER", 7)
    assert stats(path, "--max_seq_len", "64")["packed"] == whole


def test_gzip_and_pairs(stats, tmp_path):
    records = [pair("你好吗？", "很好", "不好"), pair("How?", "So", "No"), pair("你好吗？", "很好", "不好")]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    figures = stats(path)
    assert (figures["kind"], figures["records"]) == ("preference", 3)
    assert figures["copies"]["lines"] == [3]
    assert figures["turns"] == {"1": 3}
    assert figures["characters"] == 2 * 2 * (4 + 2) + (4 + 2) * 2


# ---- Copies ----


def shingles(tokens: np.ndarray) -> set[bytes]:
    return {tokens[i : i + SHINGLE].tobytes() for i in range(len(tokens) - SHINGLE + 1)}


def test_near_copies_are_those_of_a_plain_comparison(write_lines, tokenizer, monkeypatch):
    """200 texts, and two versions of each with more and more characters replaced."""
    monkeypatch.setattr("minimind.data.copies.SLAB_TOKENS", 1000)
    rng = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(2000)]
    texts = []
    for _ in range(200):
        text = rng.choices(letters, k=rng.randint(4, 150))
        texts.append("".join(text))
        for _ in range(2):
            changed = list(text)
            for _ in range(rng.randint(0, 5)):
                changed[rng.randrange(len(text))] = rng.choice(letters)
            texts.append("".join(changed))
    rng.shuffle(texts)
    store = prepare(write_lines(*({"text": text} for text in texts)), "pretrain", tokenizer, progress=False)
    exact, near = find_copies(store)

    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    assert [first[text] < i for i, text in enumerate(texts)] == exact.tolist()
    sets = [shingles(store.document(i)) for i in range(len(texts))]
    expected = [
        not exact[i]
        and len(sets[i]) > SHINGLE
        and any(len(sets[i] & sets[j]) >= NEAR * len(sets[i] | sets[j]) for j in range(i))
        for i in range(len(texts))
    ]
    found, wanted = set(np.flatnonzero(near)), set(np.flatnonzero(expected))
    assert found <= wanted
    assert len(found) >= 0.95 * len(wanted) > 50


def test_copies_with_one_checksum_are_told_apart(write_lines, tokenizer, monkeypatch):
    store = prepare(
        write_lines(*({"text": text} for text in ("天地", "玄黄", "天地"))),
        "pretrain",
        tokenizer,
        progress=False,
    )
    object.__setattr__(store, "fingerprints", np.zeros(3, np.uint32))
    exact, _ = find_copies(store)
    assert exact.tolist() == [False, False, True]


# ---- Languages ----


@example(["\u212aⰮ"])  # a Latin letter whose name does not say so, and one whose name only begins so
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_letters_are_told_by_their_script(texts):
    """As Unicode assigns scripts, but for letters that are put above others and count for nothing here."""
    regex = pytest.importorskip("regex")
    han, latin = regex.compile(r"\p{Script=Han}"), regex.compile(r"\p{Script=Latin}")

    def language(character: str) -> str:
        if not character.isalpha() and character != "〇":
            return "none"
        return "chinese" if han.match(character) else "english" if latin.match(character) else "other"

    texts = [regex.sub(r"[\p{Lm}ªº]", "ー", text) for text in texts]
    count = LanguageCount()
    count.add(texts)
    told = [language(character) for text in texts for character in text]
    shown = dict(zip(LANGUAGES, count.letters, strict=True))
    assert shown == {name: told.count(name) for name in LANGUAGES}
    assert count.characters == len(told)
    assert sum(count.records().values()) == len(texts)


# ---- Memory and mistakes ----


@pytest.mark.skipif(sys.platform != "linux", reason="pages as Linux lists them")
def test_tokens_do_not_stay_in_memory(write_lines, tokenizer):
    """They are as many as the file is long."""
    path = write_lines(
        *(chat(f"{i}", "".join(random.Random(i).choices("春江潮水连海平", k=3000))) for i in range(100))
    )
    store = prepare(path, "conversation", tokenizer, progress=False)

    def resident() -> int:
        """kB of the store's arrays."""
        mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        ours = [
            mapping for mapping in mappings if re.search(rf"{store.folder}/(tokens|weights).bin", mapping)
        ]
        return sum(int(re.search(r"Rss: +(\d+)", mapping)[1]) for mapping in ours)

    assert store.tokens.sum() + store.weights.sum() > 0
    assert resident() > 500
    statistics(path, store, tokenizer.eos_id, (512,))
    assert resident() < 100


def test_mistakes_are_sentences(write_lines, tmp_path):
    path = write_lines(*CHATS)
    with pytest.raises(UserError, match="--max_seq_len is 4; it must be at least 8"):
        main(["data", "stats", str(path), "--max_seq_len", "512", "4"])
    with pytest.raises(UserError, match="no such file"):
        main(["data", "stats", str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="no usable record in this file"):
        main(["data", "stats", str(path), "--kind", "pretrain"])
    with pytest.raises(UserError, match=r"could not write .*a\.png"):
        main(["data", "stats", str(path), "--picture", str(path / "a.png")])
