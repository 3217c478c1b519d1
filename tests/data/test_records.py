"""Every way in which a data file can be wrong, and what the reader says to it."""

from __future__ import annotations

import gzip
import re
import tracemalloc

import pytest

from minimind.data import lines as lines_of
from minimind.data.lines import BadRecord
from minimind.data.records import read_records
from minimind.errors import UserError


def user(content: str = "你好") -> dict:
    return {"role": "user", "content": content}


def assistant(content: str = "你好，有什么可以帮你？") -> dict:
    return {"role": "assistant", "content": content}


def system(content: str = "你是一个助手。") -> dict:
    return {"role": "system", "content": content}


def conversation(*messages: object) -> dict:
    return {"conversations": list(messages)}


GOOD = {
    "pretrain": {"text": "床前明月光"},
    "conversation": conversation(user(), assistant()),
    "reasoning": conversation(user(), assistant("<think>\n算\n</think>\n<answer>\n2\n</answer>")),
    "preference": {"chosen": [user(), assistant("好")], "rejected": [user(), assistant("坏")]},
}

NOT_REASONING = "is not <think>…</think> and <answer>…</answer>, once each, as reasoning is"
BAD = [
    # kind, line, field, reason
    (
        "pretrain",
        '{"text": "春"}'.encode("utf-16"),
        "line",
        "byte 1 of the line (0xff) is not UTF-8; convert the file: iconv -f UTF-16 -t UTF-8",
    ),
    (
        "pretrain",
        '{"text": "a"}'.encode("utf-16-be"),
        "line",
        "broken JSON: Expecting value at column 1; it has zero bytes in it, perhaps: iconv -f UTF-16",
    ),
    ("pretrain", b'{"text": "a"', "line", "broken JSON: Expecting ',' delimiter at column 13"),
    (
        "pretrain",
        b"{'text': 'a'}",
        "line",
        "broken JSON: Expecting property name enclosed in double quotes at column 2",
    ),
    ("pretrain", b'{"text": "a"} {"text": "b"}', "line", "broken JSON: Extra data at column 15"),
    ("pretrain", b"\0\0\0\0", "line", "broken JSON: Expecting value at column 1"),
    ("pretrain", b'{"text": "a\0b"}', "line", "broken JSON: Invalid control character at column 12"),
    ("pretrain", b'{"text": "\\ud800 a"}', "line", "half of a \\ud800–\\udfff pair, which is no character"),
    ("pretrain", b'{"text": "a", "x": ' + b"[" * 100_000, "line", "broken JSON: nested too deeply"),
    ("pretrain", b'{"text": "a\xff"}', "line", "byte 12 of the line (0xff) is not UTF-8; "),
    ("pretrain", b'{"text": "a", "title": "\xc4\xe3"}', "line", "byte 25 of the line (0xc4) is not UTF-8; "),
    ("pretrain", b"[]", "line", "expected `object`, got `array`"),
    ("pretrain", {}, "text", "missing"),
    ("pretrain", {"text": 3}, "text", "expected `str`, got `int`"),
    ("pretrain", {"text": None}, "text", "expected `str`, got `null`"),
    ("pretrain", {"text": ""}, "text", "empty"),
    ("pretrain", {"text": " \n\u3000"}, "text", "empty"),
    ("conversation", {"text": "a"}, "conversations", "missing"),
    ("conversation", conversation(), "conversations", "does not end with an answer of the assistant"),
    ("conversation", conversation("hi"), "conversations[0]", "expected `object`, got `str`"),
    ("conversation", conversation({"role": "user"}), "conversations[0].content", "missing"),
    ("conversation", conversation({"content": "a"}), "conversations[0].role", "missing"),
    (
        "conversation",
        conversation(user(), {"role": "assistant", "content": 1}),
        "conversations[1].content",
        "expected `str`, got `int`",
    ),
    (
        "conversation",
        conversation(user(), {"role": "gpt", "content": "a"}),
        "conversations[1].role",
        "unknown role `gpt`; one of system, user, assistant",
    ),
    ("conversation", conversation(assistant()), "conversations[0].role", "`assistant` where `user` belongs"),
    (
        "conversation",
        conversation(user(), user()),
        "conversations[1].role",
        "`user` where `assistant` belongs",
    ),
    (
        "conversation",
        conversation(user(), system(), assistant()),
        "conversations[1].role",
        "`system` may only come first",
    ),
    (
        "conversation",
        conversation(system(), system()),
        "conversations[1].role",
        "`system` may only come first",
    ),
    ("conversation", conversation(user()), "conversations", "does not end with an answer of the assistant"),
    ("conversation", conversation(system()), "conversations", "does not end with an answer of the assistant"),
    ("conversation", conversation(user(" "), assistant()), "conversations[0].content", "empty"),
    ("conversation", conversation(user(), assistant("")), "conversations[1].content", "empty"),
    ("conversation", conversation(system(""), user(), assistant()), "conversations[0].content", "empty"),
    ("reasoning", conversation(user(), assistant("")), "conversations[1].content", "empty"),
    *(
        ("reasoning", conversation(user(), assistant(answer)), "conversations[1].content", reason)
        for answer, reason in [
            ("2", NOT_REASONING),
            ("<answer>2</answer>", NOT_REASONING),
            ("<think>1</think>2", NOT_REASONING),
            ("<think>1</think><answer>2", NOT_REASONING),
            ("<answer>2</answer><think>1</think>", NOT_REASONING),
            ("<think>1<answer>2</answer></think>", NOT_REASONING),
            ("<think>1</think><think>1</think><answer>2</answer>", NOT_REASONING),
            ("<think>1</think><answer>2</answer>\n<answer>2</answer>", NOT_REASONING),
            ("So: <think>1</think><answer>2</answer>", NOT_REASONING),
            ("<think>1</think>so<answer>2</answer>", NOT_REASONING),
            ("<think>1</think><answer>2</answer>.", NOT_REASONING),
            ("<THINK>1</THINK><answer>2</answer>", NOT_REASONING),
            ("<think>1</think><answer>\n</answer>", "nothing between <answer> and </answer>"),
        ]
    ),
    (
        "reasoning",
        conversation(user(), assistant("<think></think><answer>2</answer>"), user(), assistant("3")),
        "conversations[3].content",
        NOT_REASONING,
    ),
    ("preference", {"chosen": [user(), assistant()]}, "rejected", "missing"),
    (
        "preference",
        {"chosen": [user()], "rejected": [user(), assistant()]},
        "chosen",
        "does not end with an answer of the assistant",
    ),
    (
        "preference",
        {"chosen": [user(), assistant()], "rejected": [user(), assistant(), user(), assistant()]},
        "rejected",
        "has 4 messages and `chosen` has 2",
    ),
    (
        "preference",
        {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
        "rejected[0]",
        "is not the message of `chosen`; only the last answer may differ",
    ),
    (
        "preference",
        {"chosen": [user(), assistant("x")], "rejected": [user(), assistant("x")]},
        "rejected[1].content",
        "the same answer as in `chosen`",
    ),
]


@pytest.mark.parametrize(("kind", "line", "field", "reason"), BAD)
def test_bad_line_is_named_and_stops(write_lines, kind, line, field, reason):
    path = write_lines(GOOD[kind], line, GOOD[kind])
    reader = read_records(path, kind)
    assert next(reader)[0] == 1  # what stands before it is read
    with pytest.raises(UserError) as error:
        next(reader)
    sentence, mend = str(error.value).split("\n")
    assert sentence.startswith(f"{path}:2: {field}: {reason}")
    assert mend.endswith("--on_bad_record skip")


@pytest.mark.parametrize(("kind", "line", "field", "reason"), BAD)
def test_bad_line_is_skipped_on_request(write_lines, kind, line, field, reason):
    path, bad_records = write_lines(GOOD[kind], line, GOOD[kind]), []
    lines = [line for line, _ in read_records(path, kind, on_bad_record="skip", bad_records=bad_records)]
    assert lines == [1, 3]
    [bad] = bad_records
    assert (bad.file, bad.line, bad.field, bad.used) == (str(path), 2, field, False)
    assert bad.reason.startswith(reason)


def test_good_records_come_typed_and_in_order(write_lines):
    path = write_lines(GOOD["preference"], {**GOOD["preference"], "score": 0.5})
    (first, record), (second, same) = read_records(path, "preference")
    assert (first, second) == (1, 2)
    assert record == same
    assert record.chosen == [user(), assistant("好")]
    assert record.rejected[1]["content"] == "坏"

    turns = conversation(system(), user("a"), assistant("b"), user("c"), assistant("d"))
    [(_, record)] = read_records(write_lines(turns), "conversation")
    assert record.conversations == turns["conversations"]


@pytest.mark.parametrize(
    "answer",
    [
        "<think>1</think><answer>2</answer>",
        " \n<think>\n1 < 2, <b>think</b>\n</think>\u3000\n<answer>\nanswer\n</answer>\n\n",
        "<think>\n</think><answer>2</answer>",
    ],
)
def test_reasoning_may_have_white_space_around_its_tags_and_no_thoughts(write_lines, answer):
    record = conversation(system(), user("<think>"), assistant(answer), user("</think>"), assistant(answer))
    [(_, read)] = read_records(write_lines(record), "reasoning")
    assert read.conversations == record["conversations"]


def test_a_pair_of_surrogates_and_an_escaped_nul_are_text(write_lines):
    [(_, record)] = read_records(write_lines(b'{"text": "\\ud83d\\ude00\\u0000"}'), "pretrain")
    assert record.text == "😀\0"


def test_blank_lines_are_passed_over_and_counted(write_lines):
    path = write_lines(b"", GOOD["pretrain"], b" \t", b"", GOOD["pretrain"], b"", b"")
    assert [line for line, _ in read_records(path, "pretrain")] == [2, 5]


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert [record.text for _, record in read_records(path, "pretrain")] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', r"begins with a byte order mark .* sed -i '1s/"),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', r"has Windows line ends .* sed -i 's/\\r\$//' FILE"),
    ],
)
def test_flaws_of_the_whole_file_stop_once_and_cost_nothing(tmp_path, content, reason):
    path, bad_records = tmp_path / "data.jsonl", []
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:1: file: {reason}"):
        list(read_records(path, "pretrain"))
    found = list(read_records(path, "pretrain", on_bad_record="skip", bad_records=bad_records))
    assert [record.text for _, record in found] == ["a", "b"]
    [bad] = bad_records
    assert bad.used


@pytest.mark.parametrize("zipped", [False, True])
def test_a_very_long_line_is_reported_without_being_held(tmp_path, zipped):
    path, bad_records = tmp_path / "data.jsonl", []
    with gzip.open(path, "wb", compresslevel=1) if zipped else path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    found = list(read_records(path, "pretrain", on_bad_record="skip", bad_records=bad_records))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(line, record.text) for line, record in found] == [(1, "a"), (3, "b")]
    assert bad_records == [
        BadRecord(str(path), 2, "line", "longer than 2 MiB; split it into several records")
    ]
    assert peak < 12 << 20


def test_the_limit_of_a_line_is_exact(write_lines):
    frame = len(b'{"text": ""}')
    fits = {"text": "x" * (lines_of.MAX_LINE_BYTES - frame)}
    too_long = {"text": fits["text"] + "x"}
    path, bad_records = write_lines(fits, too_long, fits, GOOD["pretrain"]), []
    found = read_records(path, "pretrain", on_bad_record="skip", bad_records=bad_records)
    assert [line for line, _ in found] == [1, 3, 4]
    assert [bad.line for bad in bad_records] == [2]


@pytest.mark.parametrize("zipped", [False, True])
def test_block_borders_lose_nothing(tmp_path, monkeypatch, zipped):
    path = tmp_path / "data.jsonl"
    lines = [b'{"text": "%s"}' % (b"x" * (n % 97 + 1)) for n in range(500)]
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if zipped else content)
    monkeypatch.setattr(lines_of, "BLOCK_BYTES", 256)
    blocks = list(lines_of.read_blocks(path))
    assert len(blocks) > 50
    assert b"".join(block.data for block in blocks) == content
    assert [block.first_line for block in blocks[:2]] == [1, 1 + blocks[0].data.count(b"\n")]
    assert [len(record.text) - 1 for _, record in read_records(path, "pretrain")] == [
        n % 97 for n in range(500)
    ]


def test_truncated_gzip_gives_what_came_before_and_the_line(tmp_path):
    path, bad_records = tmp_path / "data.jsonl.gz", []
    # Numbers that do not repeat, so that half of the bytes are about half of the lines.
    content = b"".join(b'{"text": "%d"}\n' % (n * 7919**3) for n in range(2000))
    packed = gzip.compress(content)
    path.write_bytes(packed[: len(packed) // 2])
    found = list(read_records(path, "pretrain", on_bad_record="skip", bad_records=bad_records))
    assert 500 < len(found) < 1500
    assert [line for line, _ in found] == list(range(1, len(found) + 1))
    [bad] = bad_records
    assert (bad.line, bad.field) == (len(found) + 1, "file")
    assert bad.reason.startswith("damaged gzip data (Compressed file ended")
    with pytest.raises(UserError, match=f":{len(found) + 1}: file: damaged gzip data"):
        list(read_records(path, "pretrain"))


def test_files_that_cannot_be_read(tmp_path, write_lines):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        next(read_records(tmp_path / "nowhere.jsonl", "pretrain"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        next(read_records(tmp_path, "pretrain"))
    for path in (write_lines(), write_lines(b"", b"")):
        with pytest.raises(UserError, match="no usable record"):
            next(read_records(path, "pretrain"))
    with pytest.raises(UserError, match="no usable record"):
        next(read_records(write_lines(b"x"), "pretrain", on_bad_record="skip"))


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("sft_mini_512", "conversation", 2381),
        ("lora_identity", "conversation", 91),
        ("r1_mix_1024", "reasoning", 1319),
        ("dpo", "preference", 300),
        ("pretrain_val", "pretrain", 660),
    ],
)
def test_real_files_are_clean(shared_data, name, kind, count):
    assert sum(1 for _ in read_records(shared_data / f"{name}.jsonl.gz", kind)) == count
