"""JSON arrays, as other tools write them, read record by record through `minimind data convert`."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from minimind.cli import main
from minimind.data.json_lines import read_items
from minimind.errors import UserError


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the command on the bytes of a file. Returns the records written, and what was said."""

    def run(content: bytes, *flags: str, name: str) -> tuple[list[dict], str]:
        path, output = tmp_path / name, tmp_path / "out" / "data.jsonl"
        path.write_bytes(content)
        output.unlink(missing_ok=True)
        assert main(["data", "convert", str(path), str(output), *flags]) == 0
        return list(map(json.loads, output.read_text(encoding="utf-8").splitlines())), capsys.readouterr().out

    return run


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays(convert, indent):
    records = [{"instruction": "问", "output": f"{i}\n]," * 50_000} for i in range(30)]
    content = json.dumps(records, indent=indent, ensure_ascii=False).encode()
    assert len(content) > 3 << 20
    written, _ = convert(content, name="in.json")
    assert [record["conversations"][1]["content"] for record in written] == [r["output"] for r in records]
    records[20] |= {"images": ["x"]}
    content = json.dumps(records, indent=indent, ensure_ascii=False).encode()
    line = content[: content.index(b'"images"')].count(b"\n") - 2 if indent else 1
    with pytest.raises(UserError, match=rf"in\.json:{line}: images: pictures"):
        convert(content, name="in.json")
    packed = gzip.compress(content)
    assert len(convert(packed, "--on_bad_record", "skip", name="in.json.gz")[0]) == 29


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"instruction": "a", "output": "b"}', r"in\.json:1: the array is cut off: its \] is missing"),
        (
            b'[\n{"instruction": "a", "output": "b"},\n{"instruc',
            r"in\.json:3: broken JSON: Unterminated string",
        ),
        (
            b'[\n{"instruction": "a", "output": "b"},\n{"a":\n\n x}]',
            r"in\.json:5: broken JSON: Expecting value",
        ),
        (b"[" * 100_000, r"in\.json:1: broken JSON"),
        (b'[{"instruction": "a", "output": "b"}] []', r"something follows the \]"),
        (b'[{"instruction": "a", "output": "\xff"}]', "is not UTF-8; convert it"),
        (b"[]", "no usable record"),
        (b'["a"]', "no usable record"),
    ],
)
def test_broken_arrays(convert, tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        convert(content, "--on_bad_record", "skip", name="in.json")
    assert not (tmp_path / "out" / "data.jsonl").exists()


def test_an_item_that_is_too_long(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "' + b"x" * (4 << 20) + b'"}]')
    with pytest.raises(
        UserError, match=r"a\.json:1: longer than 2 MiB; split it into several records; what foll"
    ):
        list(read_items(path))


def test_memory_is_flat_in_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "x" * 1000}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in read_items(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6 < path.stat().st_size
