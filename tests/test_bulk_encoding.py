"""Encoding in bulk: the ids of `tokenizers`, whatever the text; and only where that is certain."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.bulk_encoding import BEGIN, END, LONGEST, bulk_encoder
from minimind.paths import DATASET_DIR, TOKENIZER_DIR
from minimind.tokenizer import WORD, Tokenizer
from minimind.tokenizer_training import TokenizerOptions, train_tokenizer

TOKENIZER = Tokenizer.load()
SOURCE = (TOKENIZER_DIR / "tokenizer.json").read_text(encoding="utf-8")


def encoder_of(source: dict | str, word: str = WORD):
    source = source if isinstance(source, str) else json.dumps(source)
    return bulk_encoder(source, word, TOKENIZER.token_bytes, TOKENIZER.bos_id, TOKENIZER.eos_id)


def test_the_shipped_tokenizer_has_one():
    assert TOKENIZER._bulk_encoder is not None


TEXTS = (
    st.text(st.characters(exclude_categories=[]), max_size=60)  # lone surrogates too
    | st.text("ab 1。中国\n\t'sS!ſ", max_size=60)
    | st.text(f"a {BEGIN}{END}\ud83d\ude00", max_size=4)
)


@settings(max_examples=300)
@given(st.lists(TEXTS, max_size=6))
def test_any_texts(texts):
    expected = [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch(texts) == expected
    documents = TOKENIZER.encode_documents(texts)
    assert documents.tolist() == [i for text in texts for i in TOKENIZER.encode_document(text)]
    assert TOKENIZER.document_ends(documents).tolist() == [
        sum(len(ids) + 2 for ids in expected[: i + 1]) for i in range(len(texts))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(0x4E00, 0x9FFF))),
        " " * LONGEST,
        " " * (LONGEST + 1),
        "\n" * LONGEST,
        "a" * LONGEST,
        "<|im_start|>user\n<|im_end|>",
        "👩‍👩‍👧 " * 200,
    ],
    ids=["ideographs", "spaces", "too long", "newlines", "one word", "control tokens", "emoji"],
)
def test_long_and_hostile_texts(text):
    ids = [TOKENIZER.encode(part) for part in ("before ", text, " after")]
    assert TOKENIZER.encode_batch(["before ", text, " after"]) == ids


@pytest.mark.parametrize("name", ["pretrain_val", "sft_mini_512"])
def test_real_text(name):
    file = DATASET_DIR / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    with file.open(encoding="utf-8") as lines:
        texts = [line for line, _ in zip(lines, range(2000), strict=False)]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_every_character_between_words():
    characters = [chr(point) for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    texts = ["".join(f"a{c}b 1{c}" for c in characters[i : i + 64]) for i in range(0, len(characters), 64)]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_a_tokenizer_of_ones_own_has_one(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("白日依山尽，黄河入海流。The quick brown fox 123\n" * 200, encoding="utf-8")
    own = train_tokenizer(TokenizerOptions((texts,), 300, tmp_path / "own"))
    assert own._bulk_encoder is not None
    sample = ["黄河 The fox, 白日12", "什么？"]
    assert own.encode_batch(sample) == [own.encode(text) for text in sample]


def changed(**changes) -> dict:
    source = json.loads(SOURCE)
    for path, value in changes.items():
        target, *keys = source, *path.split("__")
        for key in keys[:-1]:
            target = target[int(key) if key.isdigit() else key]
        target[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = value
    return source


@pytest.mark.parametrize(
    "source",
    [
        changed(normalizer={"type": "NFC"}),
        changed(pre_tokenizer__pretokenizers__0__behavior="Removed"),
        changed(pre_tokenizer=None),
        changed(model__dropout=0.1),
        changed(added_tokens__2__special=False),
        changed(model__merges=json.loads(SOURCE)["model"]["merges"][::-1]),
        changed(model__merges=json.loads(SOURCE)["model"]["merges"][1:]),
    ],
    ids=["normalised", "marks removed", "no words", "dropout", "added word", "another order", "not reached"],
)
def test_none_where_ids_might_differ(source):
    assert encoder_of(SOURCE) is not None
    assert encoder_of(source) is None


def test_none_for_other_words():
    assert encoder_of(SOURCE, word=r"\p{L}+|\P{L}+") is None


def test_other_tokenizers_are_left_to_their_library(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in TOKENIZER_DIR.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(changed(normalizer={"type": "Lowercase"})))
    other = Tokenizer.load(folder)
    assert other.encode_batch(["The Fox"]) == [TOKENIZER.encode("the fox")]
