"""Reading C-Eval and CMMLU files, good and bad, and what the model gets to read."""

from __future__ import annotations

import gzip
import json

import pytest

from minimind.errors import UserError
from minimind.evaluate.questions import LONGEST, encode_prompts, examples_by_subject, read_questions
from minimind.tokenizer import Tokenizer

RECORD = {"question": " 1+1= ", "A": "1", "B": "2 ", "C": "3", "D": "4", "answer": "B", "subject": "数学"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


def write(path, *records) -> str:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    return path


def test_json_lines_with_bom_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "q.jsonl"
    line = json.dumps(RECORD, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    first, second = read_questions(path)
    assert (first.text, first.options, first.answer, first.subject) == (
        "1+1=",
        ("1", "2", "3", "4"),
        1,
        "数学",
    )
    assert (first.line, second.line) == (1, 3)


def test_gzip_and_the_subject_from_the_name(tmp_path):
    path = tmp_path / "computer_network_val.jsonl.gz"
    record = {name: value for name, value in RECORD.items() if name != "subject"}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    assert read_questions(path)[0].subject == "computer_network"


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("accountant_val.csv", "id,question,A,B,C,D,answer,explanation"),
        ("agronomy.csv", ",Question,A,B,C,D,Answer"),
    ],
    ids=["C-Eval", "CMMLU"],
)
def test_the_csv_files_that_the_benchmarks_publish(tmp_path, name, head):
    path = tmp_path / name
    path.write_text(f'\ufeff{head}\n0,"多行\n的题，有逗号",甲,乙,丙,丁,d,\n', encoding="utf-8")
    (question,) = read_questions(path)
    assert question.text == "多行\n的题，有逗号"
    assert question.answer == 3
    assert question.subject == name.removesuffix(".csv").removesuffix("_val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "q.jsonl:2: answer: 'E' is none of A, B, C and D"),
        ({"answer": ""}, "test parts are published without answers"),
        ({"answer": 2}, "q.jsonl:2: answer: expected `str`, got `int`"),
        ({"C": " "}, "q.jsonl:2: C: empty"),
        ({"question": None}, "q.jsonl:2: question: expected `str`, got `null`"),
        ({"subject": ["x"]}, "q.jsonl:2: subject: expected `str | null`, got `array`"),
    ],
)
def test_a_bad_record_is_named(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        read_questions(write(tmp_path / "q.jsonl", RECORD, RECORD | change))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no question in this file"),
        (b"[1, 2]\n", "q.jsonl:1: line: expected `object`, got `array`"),
        (b'{"question": "x"', "q.jsonl:1: line: broken JSON"),
        (b'{"question": "\xff"}', "is not UTF-8"),
        (b'{"question": "x"}', "q.jsonl:1: A: missing"),
        (b'{"a":' * 100_000, "q.jsonl:1: line: broken JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv", "folder.jsonl", "folder.csv"])
def test_no_file(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        read_questions(tmp_path / name)


def test_csv_in_another_encoding(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes("question,A,B,C,D,answer\n问题,甲,乙,丙,丁,A\n".encode("gb18030"))
    with pytest.raises(UserError, match="is not CSV in UTF-8"):
        read_questions(path)


def test_csv_that_lacks_a_cell(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,A,B,C,D,answer\n问题,甲,乙\n")
    with pytest.raises(UserError, match=r"q\.csv:2: C: missing"):
        read_questions(path)


def test_prompts_written_out(tmp_path, tokenizer):
    (question,) = read_questions(write(tmp_path / "q.jsonl", RECORD))

    def prompt(way: str, chat: bool, examples=()) -> str:
        ((ids, endings, _),) = encode_prompts([question], examples, way, tokenizer, chat, 512)
        return tokenizer.decode(ids, skip_special_tokens=False), [tokenizer.decode(e) for e in endings]

    listed = "1+1=\nA. 1\nB. 2\nC. 3\nD. 4"
    assert prompt("letter", False) == (f"<|im_start|>{listed}\n答案：", [" A", " B", " C", " D"])
    assert prompt("text", False) == ("<|im_start|>1+1=\n答案：", [" 1", " 2", " 3", " 4"])
    assert prompt("letter", True)[0] == (
        f"<|im_start|>user\n{listed}<|im_end|>\n<|im_start|>assistant\n答案："
    )
    assert prompt("letter", False, [question])[0] == (f"<|im_start|>{listed}\n答案： B\n\n{listed}\n答案：")
    assert prompt("text", False, [question])[0] == "<|im_start|>1+1=\n答案： 2\n\n1+1=\n答案："


def test_text_cannot_become_a_control_token(tmp_path, tokenizer):
    record = RECORD | {"question": "<|im_end|>", "A": "<|im_start|>"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", record))
    ((ids, endings, _),) = encode_prompts([question], [], "text", tokenizer, False, 512)
    assert not {0, 1, 2} & {*ids[1:], *endings[0]}


def test_examples_that_do_not_fit_are_left_out(tmp_path, tokenizer):
    short = read_questions(write(tmp_path / "q.jsonl", RECORD))[0]
    long = read_questions(write(tmp_path / "l.jsonl", RECORD | {"question": "长" * 60}))[0]
    examples = [short] * 5
    encoded = encode_prompts([short, long], examples, "letter", tokenizer, False, 100)
    counts = [count for *_, count in encoded]
    assert counts[0] > counts[1]
    for (ids, endings, count), question in zip(encoded, (short, long), strict=True):
        assert len(ids) + len(endings[0]) <= 100
        fewer = encode_prompts([question], examples[:count], "letter", tokenizer, False, 10**6)
        assert fewer[0][0] == ids
        more = encode_prompts([question], examples[: count + 1], "letter", tokenizer, False, 10**6)
        assert len(more[0][0]) + len(endings[0]) > 100


def test_a_question_of_thousands_of_tokens_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", RECORD, RECORD | {"question": "长" * 2 * LONGEST})
    with pytest.raises(UserError, match=r"q\.jsonl:2: takes .* tokens"):
        encode_prompts(read_questions(path), [], "text", tokenizer, False, 512)


def test_examples_are_the_first_of_the_subject(tmp_path):
    records = [RECORD | {"question": str(i), "subject": "ab"[i % 2]} for i in range(6)]
    path = write(tmp_path / "dev.jsonl", *records)
    found = examples_by_subject(path, ["b"], 2)
    assert [question.text for question in found["b"]] == ["1", "3"]
    with pytest.raises(UserError, match=r"has 3 examples of b and --shots is 5"):
        examples_by_subject(path, ["b"], 5)
    with pytest.raises(UserError, match="has 0 examples of c"):
        examples_by_subject(path, ["c"], 1)
