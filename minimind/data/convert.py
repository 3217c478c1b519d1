"""Convert data to MiniMind's formats, and to those of LLaMA-Factory.

    minimind data convert alpaca_zh.json dataset/alpaca_zh.jsonl
    minimind data convert dataset/dpo.jsonl data/dpo.jsonl --to sharegpt

Reads JSONL and JSON arrays, plain or .gz. How a file is laid out is told by the dataset_info.json beside it,
else by its first record. The dataset_info.json beside an output for LLaMA-Factory gets the entry it needs.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec

from minimind.data.json_lines import read_items
from minimind.data.lines import BadRecord, no_records
from minimind.data.llamafactory import LAYOUTS, Layout, format_of
from minimind.data.records import ANY_OBJECT, InvalidLine, Kind, OnBadRecord, decode_line, parse_line
from minimind.errors import UserError
from minimind.files import atomic_write, refuse_to_replace, write_text
from minimind.flags import REQUIRED, flag, parse_flags

DATASET_INFO = "dataset_info.json"
# LLaMA-Factory's reader takes the types of the columns from so many bytes at the start of a file.
BYTES_OF_TYPES = 10 << 20


@dataclass(frozen=True)
class ConvertOptions:
    file: Path = flag(REQUIRED, "file to read", positional=True)
    output: Path = flag(REQUIRED, "JSONL file to write, packed if it ends in .gz", positional=True)
    to: str = flag("minimind", "format to write", choices=("minimind", *LAYOUTS))
    source: str = flag("auto", "format of the file that is read", choices=("auto", "minimind", *LAYOUTS))
    dataset_name: str | None = flag(None, f"name of the entry in {DATASET_INFO}; without it the output's")
    on_bad_record: OnBadRecord = flag(
        "stop", "what to do about a record that is broken or not expressible", choices=get_args(OnBadRecord)
    )


@dataclass(frozen=True)
class Conversion:
    """How records are read and written; None stands for MiniMind's own format."""

    read: Layout | None
    write: Layout | None
    kind: Kind  # of all records

    def __call__(self, line: bytes) -> dict[str, Any]:
        """The record of a line in the other format. Raises: InvalidLine."""
        if self.read:
            fields = decode_line(line, ANY_OBJECT)
            chats = self.read.to_minimind(fields)
            if ("chosen" in chats) != (self.kind == "preference"):
                first = "pair of answers" if self.kind == "preference" else "conversation"
                raise InvalidLine("record", f"is no {first}, as the first record is")
            line = msgspec.json.encode(chats)
        record = msgspec.to_builtins(parse_line(line, self.kind))
        return self.write.from_minimind(record) if self.write else record


class Flaws:
    """What to do about bad records: raise the first, or count them and list them in a file."""

    def __init__(self, path: Path, on_bad_record: OnBadRecord) -> None:
        self.path, self.count = path, 0
        self.first: BadRecord | None = None
        self._stop = on_bad_record == "stop"
        self._file: BinaryIO | None = None

    def add(self, flaw: BadRecord) -> None:
        if self._stop:
            raise flaw.stop()
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(msgspec.json.encode(flaw._asdict()) + b"\n")
        self.first = self.first or flaw
        self.count += not flaw.used

    def close(self) -> None:
        if self._file:
            self._file.close()


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(ConvertOptions, argv, __doc__)
    if not options.output.name.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(
            f"{options.output}: the name must end in .jsonl or .jsonl.gz, as what is written is that"
        )
    refuse_to_replace(options.output)
    conversion = plan(options)
    info = new_info(options, conversion.write, conversion.kind) if conversion.write else None
    flaws = Flaws(options.output.with_name(f"{options.output.name}.bad_records.jsonl"), options.on_bad_record)
    with contextlib.closing(flaws):
        count, first_history = convert(options.file, options.output, conversion, flaws)
    print(f"{options.output}: {count:,} records in the format {options.to}")
    if flaws.first:
        print(f"{flaws.count:,} bad records skipped; all flaws: {flaws.path}\n  the first: {flaws.first}")
    if info:
        path = options.output.parent / DATASET_INFO
        write_text(path, json.dumps(info, ensure_ascii=False, indent=2) + "\n")
        print(f"{path}: has its entry, {entry_name(options)}")
    if info and options.output.suffix == ".gz":
        print("LLaMA-Factory reads no .gz; unpack it there")
    if info and first_history > BYTES_OF_TYPES:
        print(
            "LLaMA-Factory's reader will stumble over the first history, which comes late in the file; "
            "--to sharegpt has no such trouble"
        )
    return 0


def plan(options: ConvertOptions) -> Conversion:
    """How to convert, by `dataset_info.json` or the first record. Raises: UserError where neither tells."""
    first = next(whole_records(options.file), None)
    if first is None:
        raise no_records(options.file)
    layout = layout_beside(options.file) if options.source == "auto" else None
    if layout is None:
        source = format_of(first) if options.source == "auto" else options.source
        if source is None:
            raise UserError(
                f"{options.file}: the first record has the fields of no known format; give --source, or an "
                f"entry for it in a {DATASET_INFO} beside it"
            )
        layout = LAYOUTS.get(source)
    if layout:
        return Conversion(
            layout, LAYOUTS.get(options.to), "preference" if layout.is_pair(first) else "conversation"
        )
    kind: Kind = "pretrain" if "text" in first else "preference" if "chosen" in first else "conversation"
    if kind == "pretrain" and options.to != "minimind":
        entry = json.dumps({"file_name": options.file.name, "columns": {"prompt": "text"}})
        raise UserError(f"{options.file}: LLaMA-Factory reads texts as they are, with the entry {entry}")
    return Conversion(None, LAYOUTS.get(options.to), kind)


def whole_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that are JSON objects."""
    for item in read_items(path):
        if not isinstance(item, BadRecord):
            with contextlib.suppress(InvalidLine):
                yield decode_line(item[1], ANY_OBJECT)


def convert(path: Path, output: Path, conversion: Conversion, flaws: Flaws) -> tuple[int, int]:
    """Write the records of `path` to `output`, which is there only when it is whole.

    Returns: how many, and how many bytes there are before the first with a history, 0 where none has any.
    Raises: UserError when `flaws` does, there is no usable record, or the disk is full.
    """
    count = first_history = 0

    def write(file: BinaryIO | gzip.GzipFile) -> None:
        nonlocal count, first_history
        for record in converted(path, conversion, flaws):
            if record.get("history"):
                first_history = first_history or file.tell()
            file.write(msgspec.json.encode(record) + b"\n")
            count += 1
        if not count:
            raise no_records(path)

    def write_gzip(file: BinaryIO) -> None:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as zipped:
            write(zipped)

    atomic_write(output, write_gzip if output.suffix == ".gz" else write)
    return count, first_history


def converted(path: Path, conversion: Conversion, flaws: Flaws) -> Iterator[dict[str, Any]]:
    """The good records of `path` in the other format."""
    for item in read_items(path):
        if isinstance(item, BadRecord):
            flaws.add(item)
            continue
        line, content = item
        try:
            record = conversion(content)
        except InvalidLine as error:
            flaws.add(BadRecord(str(path), line, error.field, error.reason))
        else:
            yield record


# dataset_info.json


def layout_beside(path: Path) -> Layout | None:
    """What the `dataset_info.json` in the folder of `path` says of it."""
    for entry in read_info(path.parent / DATASET_INFO).values():
        if isinstance(entry, dict) and entry.get("file_name") in (path.name, path.name.removesuffix(".gz")):
            return Layout.from_entry(entry)
    return None


def new_info(options: ConvertOptions, layout: Layout, kind: Kind) -> dict[str, Any]:
    """The `dataset_info.json` beside the output, with its entry. Raises: UserError when the name is taken."""
    path, name = options.output.parent / DATASET_INFO, entry_name(options)
    file_name = options.output.name.removesuffix(".gz")
    info = read_info(path)
    if name in info and (not isinstance(info[name], dict) or info[name].get("file_name") != file_name):
        raise UserError(f"{path} has an entry {name} for something else; choose another --dataset_name")
    return info | {name: layout.entry(file_name, kind)}


def read_info(path: Path) -> dict[str, Any]:
    """The entries of a `dataset_info.json`, none if there is no file. Raises: UserError for a broken one."""
    try:
        return ANY_OBJECT.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend it or move it") from None


def entry_name(options: ConvertOptions) -> str:
    return options.dataset_name or options.output.name.removesuffix(".gz").removesuffix(".jsonl")
