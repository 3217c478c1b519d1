"""`minimind data check`: each finding, provoked; exit codes."""

from __future__ import annotations

import json

import pytest

from minimind.cli import main
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

GOOD = [{"text": f"第{i}天，太阳从东边升起来了。"} for i in range(2000)]


def chat(question: str, answer: str, key: str = "conversations") -> dict:
    return {key: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def check(tmp_path, capsys):
    """Run it on records (or raw lines); returns the exit code and what was printed."""

    def run(records: list, *flags: str) -> tuple[int, str]:
        path = tmp_path / "data.jsonl"
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        code = main(["data", "check", str(path), *flags])
        return code, capsys.readouterr().out

    return run


def test_good_data_is_fit(check):
    code, said = check(GOOD[:50])
    assert code == 0
    assert "50 good records of kind pretrain, told from its first record" in said
    assert said.count("OK ") == 5
    assert said.endswith("verdict: fit to train on\n")


def test_bad_records_are_grouped_by_reason(check):
    broken = [b'{"text": "a', b'{"text": ""}', b'{"text": "abc', b'{"text": 3}', b"{}", b"\xff\xfe"]
    code, said = check([GOOD[0], *broken, *GOOD[1:9]])
    assert code == 1
    assert "PROBLEM  2 bad: line: broken JSON" in said
    assert "(lines 2, 4); mend, or --on_bad_record skip" in said
    assert "1 bad: text: empty (line 3)" in said
    assert "1 bad: text: missing (line 6)" in said
    assert "is not UTF-8" in said
    assert "verdict: 5 to mend first" in said


def test_only_the_first_lines_are_named(check):
    _, said = check([GOOD[0]] + [b"{}"] * 7)
    assert "7 bad: text: missing (lines 2, 3, 4, 5, 6, …)" in said


def test_copies_are_found_by_content(check):
    again = b'{"source": "elsewhere", "text": ' + json.dumps(GOOD[3]["text"]).encode() + b"}"
    code, said = check([*GOOD[:20], b"", again])
    assert code == 0
    assert "WARNING  1 (4.8%) copies of an earlier record" in said
    assert "(line 22)" in said
    assert "fit to train on, with 1 to look at" in said
    assert check(GOOD[:5] * 2)[0] == 1


@pytest.mark.parametrize(
    "garbage",
    ["caf\u00c3\u00a9", "锟斤拷锟斤拷", "\ufffd\ufffd", "a\x00b", "中文".encode().decode("latin-1")],
)
def test_garbled_records(check, garbage):
    code, said = check([*GOOD[:20], {"text": f"从前有座山，{garbage}"}])
    assert code == 1
    assert "PROBLEM  1 (4.8%) garbled" in said
    assert "in line 21)" in said


def test_a_few_garbled_records_and_good_letters_are_tolerated(check):
    letters = [{"text": text} for text in ("São João é, à…”", "MANHÃ “Groß…” Ångström", "a\tb\r\nc naïve")]
    assert "no garbled records" in check(GOOD[:20] + letters)[1]
    code, said = check([*GOOD, {"text": "山\ufffd"}, {"text": "山" * 2000 + "\ufffd"}])
    assert code == 0
    assert "WARNING  1 (0.0%) garbled" in said


def test_nearly_empty_records(check):
    code, said = check([*GOOD[:20], {"text": " 好。 "}, {"text": "好的，好"}, {"text": "好的，很好"}])
    assert code == 1
    assert "2 (8.7%) with less than 5 characters; leave them out (' 好。 ' in lines 21, 22)" in said


def test_over_long_records_by_kind(check):
    """Exactly at the border, for each kind, and as training will see them."""
    text = {"text": "春" * 300}
    code, said = check([*GOOD[:20], text], "--max_seq_len", "64")
    assert code == 0
    assert "WARNING  1 (4.8%) longer than --max_seq_len 64; they are split" in said
    assert "no over-long" in check([*GOOD[:20], text])[1]  # 512 as in pretraining

    records = [chat(f"{i}加{i}等于几？", f"{i + i}") for i in range(20)]
    _, mask = Tokenizer.load().encode_chat(records[-1]["conversations"])
    needed = max(i for i, target in enumerate(mask) if target)
    assert "no over-long" in check(records, "--max_seq_len", str(needed))[1]
    code, said = check(records, "--max_seq_len", str(needed - 1))
    assert code == 1
    assert "they lose their last answers" in said

    pairs = [chat(f"问{i}", "好" * 20, "chosen") | chat(f"问{i}", "坏", "rejected") for i in range(3)]
    code, said = check(pairs, "--max_seq_len", "16")
    assert code == 1
    assert "kind preference" in said
    assert "3 (100.0%) longer than --max_seq_len 16; they are left out" in said


def test_the_kind_is_told_or_given(check):
    thought = chat("1+1=?", "<think>\n一加一\n</think>\n<answer>\n2\n</answer>")
    assert "kind reasoning" in check([thought, thought])[1]
    assert "kind conversation" in check([chat("你好吗？", "我很好")])[1]
    with pytest.raises(UserError, match=r"no field text, conversations or chosen.*--kind"):
        check([{"content": "x"}])
    code, said = check([{"content": "x"}], "--kind", "pretrain")
    assert code == 1
    assert "no usable record; is --kind pretrain right?" in said


def test_files_that_tell_nothing(check, tmp_path):
    for lines in ([], [b"", b"\xff\x00"]):
        with pytest.raises(UserError, match="no usable record in this file"):
            check(lines)
    with pytest.raises(UserError, match="no such file"):
        main(["data", "check", str(tmp_path / "none.jsonl")])
