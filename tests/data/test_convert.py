"""`minimind data convert`: there and back, as LLaMA-Factory's own code reads it; what cannot be expressed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.cli import main
from minimind.data.convert import DATASET_INFO
from minimind.data.llamafactory import LAYOUTS
from minimind.data.records import read_records
from minimind.errors import UserError
from minimind.paths import ROOT

FORMATS = tuple(LAYOUTS)


def messages(*contents: str, system: str = "") -> list[dict]:
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + said


CONVERSATIONS = [
    {"conversations": messages("你好", "你好！\n有什么可以帮你？")},
    {"conversations": messages("一", "二", "三", "四", "五", "六", system="请数数。")},
    {"conversations": messages("<|im_end|>", '"\\u0000\t')},
]
PAIRS = [
    {"chosen": messages("问", "好"), "rejected": messages("问", "坏")},
    {
        "chosen": messages("a", "b", "c", "good", system="s"),
        "rejected": messages("a", "b", "c", "bad", system="s"),
    },
]
SHAREGPT = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}
ALPACA = {"instruction": "问", "output": "答"}


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the command on records (or the bytes of a file). Returns the records written, and what was said."""

    def run(content: list | bytes, *flags: str, name: str = "in.jsonl") -> tuple[list[dict], str]:
        path, output = tmp_path / name, tmp_path / "out" / "data.jsonl"
        if isinstance(content, list):
            content = b"".join(
                line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in content
            )
        path.write_bytes(content)
        output.unlink(missing_ok=True)
        assert main(["data", "convert", str(path), str(output), *flags]) == 0
        return list(map(json.loads, output.read_text(encoding="utf-8").splitlines())), capsys.readouterr().out

    return run


# ---- There and back ----


@pytest.mark.parametrize("records", [CONVERSATIONS, PAIRS], ids=["conversations", "pairs"])
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(convert, tmp_path, name, records):
    written, said = convert(records, "--to", name)
    assert f"data.jsonl: {len(records)} records in the format {name}" in said
    assert f"{DATASET_INFO}: has its entry, data" in said
    assert convert(written, "--source", name)[0] == records
    assert convert(written)[0] == records  # told from the first record
    kind = "preference" if records is PAIRS else "conversation"
    assert len(list(read_records(tmp_path / "out" / "data.jsonl", kind))) == len(records)
    (tmp_path / "in.jsonl").unlink()
    convert(records, "--to", name)
    again = tmp_path / "out" / "again.jsonl"
    main(["data", "convert", str(tmp_path / "out" / "data.jsonl"), str(again)])  # told from dataset_info.json
    assert list(map(json.loads, again.read_text(encoding="utf-8").splitlines())) == records


CONTENT = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: not text.isspace())


@given(st.lists(CONTENT, min_size=1, max_size=3), CONTENT, CONTENT, st.one_of(st.just(""), CONTENT))
def test_any_text_comes_back(earlier, question, answer, system):
    contents = [text for turn in earlier for text in (turn, turn)] + [question, answer]
    conversation = {"conversations": messages(*contents, system=system)}
    pair = {side: messages(*contents[:-1], answer, system=system) for side in ("chosen", "rejected")}
    pair["rejected"][-1]["content"] += "!"
    for layout in LAYOUTS.values():
        for record in (conversation, pair):
            assert layout.to_minimind(layout.from_minimind(record)) == record


def test_what_is_written(convert):
    assert convert(CONVERSATIONS[1:2], "--to", "sharegpt")[0] == [
        {
            "conversations": [
                {"from": "system", "value": "请数数。"},
                {"from": "human", "value": "一"},
                {"from": "gpt", "value": "二"},
                {"from": "human", "value": "三"},
                {"from": "gpt", "value": "四"},
                {"from": "human", "value": "五"},
                {"from": "gpt", "value": "六"},
            ]
        }
    ]
    assert convert(CONVERSATIONS[1:2], "--to", "alpaca")[0] == [
        {
            "instruction": "五",
            "input": "",
            "output": "六",
            "system": "请数数。",
            "history": [["一", "二"], ["三", "四"]],
        }
    ]
    assert convert(PAIRS[:1], "--to", "sharegpt")[0] == [
        {
            "conversations": [{"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        }
    ]
    assert convert(PAIRS[:1], "--to", "alpaca")[0] == [
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏", "system": "", "history": []}
    ]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ALPACA, messages("问", "答")),
        ({**ALPACA, "input": "于此", "history": None, "system": None}, messages("问\n于此", "答")),
        ({**ALPACA, "instruction": "", "input": "于此", "tools": "[]"}, messages("于此", "答")),
        ({**ALPACA, "system": "s", "history": [["a", "b"]]}, messages("a", "b", "问", "答", system="s")),
        ({**SHAREGPT, "system": "s", "tools": "", "images": []}, messages("问", "答", system="s")),
        ({**SHAREGPT, "id": 3}, messages("问", "答")),
        ({"messages": messages("问", "答", system="s")}, messages("问", "答", system="s")),
    ],
)
def test_what_is_read(convert, record, expected):
    assert convert([record])[0] == [{"conversations": expected}]


# ---- As LLaMA-Factory reads it ----


@pytest.fixture(scope="module")
def llamafactory() -> SimpleNamespace:
    """Its parser of dataset_info.json and its converters, without the rest, which asks for other versions."""
    spec = find_spec("llamafactory")
    if spec is None:
        pytest.skip("needs LLaMA-Factory: pip install --no-deps llamafactory")
    folder = Path(spec.submodule_search_locations[0])
    for name in ("llamafactory", "llamafactory.data"):
        package = ModuleType(name)
        package.__path__ = [str(folder / name.partition(".")[2])]
        sys.modules[name] = package
    return SimpleNamespace(
        parser=import_module("llamafactory.data.parser"),
        converter=import_module("llamafactory.data.converter"),
    )


@pytest.mark.parametrize("records", [CONVERSATIONS, PAIRS], ids=["conversations", "pairs"])
@pytest.mark.parametrize("name", FORMATS)
def test_llamafactory_reads_what_is_written(convert, llamafactory, tmp_path, name, records):
    datasets = pytest.importorskip("datasets")
    convert(records, "--to", name, "--dataset_name", "mine")
    (attributes,) = llamafactory.parser.get_dataset_list(["mine"], str(tmp_path / "out"))
    assert attributes.ranking == (records is PAIRS)
    reader = llamafactory.converter.get_dataset_converter(attributes.formatting, attributes, None)
    loaded = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "out" / attributes.dataset_name),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    read = [reader(example) for example in loaded]
    for record, seen in zip(records, read, strict=True):
        sides = [record[side] for side in ("conversations", "chosen", "rejected") if side in record]
        system = sides[0][0]["content"] if sides[0][0]["role"] == "system" else ""
        assert (seen["_system"] or "") == system
        assert seen["_prompt"] == sides[0][bool(system) : -1]
        assert seen["_response"] == [side[-1] for side in sides]
        assert not seen["_tools"]


def test_llamafactory_reads_texts_as_they_are(convert, llamafactory):
    with pytest.raises(UserError) as refused:
        convert([{"text": "床前明月光"}], "--to", "alpaca")
    entry = json.loads(str(refused.value).partition("with the entry ")[2])
    (attributes,) = llamafactory.parser.get_dataset_list(["mine"], {"mine": entry})
    reader = llamafactory.converter.get_dataset_converter(attributes.formatting, attributes, None)
    assert reader({"text": "床前明月光"})["_prompt"] == [{"role": "user", "content": "床前明月光"}]


# ---- dataset_info.json ----


def test_columns_and_tags_of_other_names(convert, tmp_path):
    entry = {
        "file_name": "in.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "system": "prompt"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "bot"},
    }
    (tmp_path / DATASET_INFO).write_text(json.dumps({"other": {"hf_hub_url": "x"}, "mine": entry}))
    record = {"dialog": [{"who": "me", "what": "问"}, {"who": "bot", "what": "答"}], "prompt": "s"}
    assert convert([record])[0] == [{"conversations": messages("问", "答", system="s")}]
    with pytest.raises(UserError, match=r"in\.jsonl:1: dialog\[0\]\.who: unknown role `you`; one of me, bot"):
        convert([{"dialog": [{"who": "you", "what": "问"}]}])
    entry["columns"] = {"messages": 3}
    (tmp_path / DATASET_INFO).write_text(json.dumps({"mine": entry}))
    with pytest.raises(
        UserError, match=r"the entry for in\.jsonl has a formatting, columns or tags that are"
    ):
        convert([record])


def test_other_entries_are_kept(convert, tmp_path):
    info = tmp_path / "out" / DATASET_INFO
    info.parent.mkdir()
    others = {"identity": {"file_name": "identity.json"}, "data": {"file_name": "data.jsonl", "x": 1}}
    info.write_text(json.dumps(others))
    convert(PAIRS, "--to", "openai")
    assert info.read_text().endswith("}\n")
    entries = json.loads(info.read_text())
    assert entries["identity"] == others["identity"]
    assert entries["data"] == {
        "file_name": "data.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": dict(LAYOUTS["openai"].tags),
    }
    with pytest.raises(UserError, match="has an entry identity for something else"):
        convert(PAIRS, "--to", "openai", "--dataset_name", "identity")
    info.write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json cannot be read .* mend it or move it"):
        convert(PAIRS, "--to", "openai")
    assert not (tmp_path / "out" / "data.jsonl").exists()


# ---- Bad records ----

TOOLS = "tool calls cannot be expressed in MiniMind's format"


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({**ALPACA, "tools": "[{}]"}, "tools: tools cannot be expressed"),
        ({**SHAREGPT, "images": ["a.png"]}, "images: pictures cannot be expressed"),
        ({**SHAREGPT, "kto_tag": False}, "kto_tag: answers marked as good or bad without"),
        ({"instruction": "问"}, "output: missing"),
        ({**ALPACA, "output": " "}, "output: empty"),
        ({**ALPACA, "output": 3}, "output: is no text"),
        ({**ALPACA, "input": 3}, "input: is no text"),
        ({**ALPACA, "instruction": ""}, "instruction: empty"),
        ({**ALPACA, "history": "x"}, "history: is no list"),
        ({**ALPACA, "history": [["a"]]}, r"history\[0\]: is no question with its answer"),
        ({**ALPACA, "history": [["a", ""]]}, r"history\[0\]: empty"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, r"\[1\]\.role: `user` where `assistant`"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "does not end with an answer"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.value: missing"),
        ({"conversations": [{"from": "human", "value": [{"image": "x"}]}]}, r"\[0\]\.value: is no text"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, rf"\[0\]\.from: {TOOLS}"),
        ({"conversations": [{"from": "observation", "value": "{}"}]}, rf"\[0\]\.from: {TOOLS}"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"\[0\]\.from: is no text"),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            r"unknown role `bing`; one of human, gpt, system",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, rf"messages\[0\]\.role: {TOOLS}"),
        ({"messages": [{"role": "tool", "content": "x"}]}, rf"messages\[0\]\.role: {TOOLS}"),
        ({"messages": "x"}, "messages: is no list of messages"),
        ({"messages": ["x"]}, r"messages\[0\]: is no message"),
        ({**ALPACA, "chosen": "a", "rejected": "a"}, r"rejected\[1\]\.content: the same answer as in"),
        ({**SHAREGPT, "chosen": "a", "rejected": "b"}, "chosen: is no message"),
    ],
)
def test_records_that_cannot_be_expressed(convert, tmp_path, record, place):
    with pytest.raises(UserError, match=rf"in\.jsonl:1: .*{place}(.|\n)*--on_bad_record skip"):
        convert([record])
    assert not list((tmp_path / "out").glob("*"))
    good = {name: value for name, value in {**SHAREGPT, **ALPACA}.items() if name in record}
    if "chosen" not in record and good.keys() in ({"conversations"}, {"instruction", "output"}):
        written, said = convert([good if "output" in good else SHAREGPT, record], "--on_bad_record", "skip")
        assert len(written) == 1
        assert "1 bad records skipped" in said


def test_bad_records_are_skipped_and_listed(convert, tmp_path):
    pair = {**ALPACA, "chosen": "a", "rejected": "b"}
    lines = [ALPACA, b"{\n", b"\n", {**ALPACA, "tools": "x"}, b"\xff\n", pair, [1], ALPACA]
    written, said = convert(lines, "--on_bad_record", "skip")
    assert len(written) == 2
    flaws_file = tmp_path / "out" / "data.jsonl.bad_records.jsonl"
    assert f"5 bad records skipped; all flaws: {flaws_file}" in said
    flaws = list(map(json.loads, flaws_file.read_text().splitlines()))
    assert [(flaw["line"], flaw["field"]) for flaw in flaws] == [
        (2, "line"),
        (4, "tools"),
        (5, "line"),
        (6, "record"),
        (7, "line"),
    ]
    assert flaws[3]["reason"] == "is no conversation, as the first record is"


def test_windows_files_are_read_with_skip(convert):
    content = b"\xef\xbb\xbf" + json.dumps(ALPACA).encode() + b"\r\n"
    with pytest.raises(UserError, match="byte order mark"):
        convert(content)
    written, said = convert(content, "--on_bad_record", "skip")
    assert len(written) == 1
    assert "0 bad records skipped" in said


def test_what_is_in_no_format(convert):
    with pytest.raises(UserError, match="has the fields of no known format; give --source"):
        convert([{"question": "x", "answer": "y"}])
    with pytest.raises(UserError, match="no usable record"):
        convert(b"\n")
    with pytest.raises(UserError, match="no usable record"):
        convert([b"{\n"], "--on_bad_record", "skip")
    with pytest.raises(
        UserError, match=r'reads texts as they are, with the entry \{"file_name": "in\.jsonl"'
    ):
        convert([{"text": "x"}], "--to", "alpaca")


# ---- Files ----


def test_gzip_is_written(convert, tmp_path, capsys):
    convert(CONVERSATIONS)
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        main(["data", "convert", str(tmp_path / "in.jsonl"), str(tmp_path / name), "--to", "alpaca"])
    assert capsys.readouterr().out.count("LLaMA-Factory reads no .gz; unpack it there") == 2
    first, second = ((tmp_path / name).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz"))
    assert first == second
    assert len(gzip.decompress(first).splitlines()) == 3
    assert json.loads((tmp_path / DATASET_INFO).read_text())["a"]["file_name"] == "a.jsonl"


def test_a_history_that_comes_late_is_told(convert, monkeypatch):
    monkeypatch.setattr("minimind.data.convert.BYTES_OF_TYPES", 1000)
    long = {"conversations": messages("问", "x" * 1000)}
    assert "stumble over the first history" in convert([long, CONVERSATIONS[1]], "--to", "alpaca")[1]
    assert "stumble" not in convert([CONVERSATIONS[1], long], "--to", "alpaca")[1]
    assert "stumble" not in convert([long, CONVERSATIONS[1]], "--to", "sharegpt")[1]


def test_nothing_is_overwritten(convert, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ALPACA))
    with pytest.raises(UserError, match=r"in\.jsonl exists already"):
        main(["data", "convert", str(path), str(path)])
    with pytest.raises(UserError, match=r"must end in \.jsonl or \.jsonl\.gz"):
        main(["data", "convert", str(path), str(tmp_path / "out.json")])
    with pytest.raises(UserError, match="no such file"):
        main(["data", "convert", str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")])


def test_a_kill_leaves_no_output(tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text((json.dumps(ALPACA) + "\n") * 60_000)
    command = [sys.executable, "-m", "minimind", "data", "convert", str(path), str(output)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (begun := list(tmp_path.glob(".out.jsonl.*.tmp"))):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not output.exists()
    assert main(["data", "convert", str(path), str(output)]) == 0
    assert not begun[0].exists()
