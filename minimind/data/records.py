"""Read the project's JSONL files, and say exactly where one is wrong.

    {"text": "…"}                                                       kind "pretrain"
    {"conversations": [{"role": "user", "content": "…"}, …]}            kind "conversation"
      the same, answers `<think>…</think><answer>…</answer>`            kind "reasoning"
    {"chosen": [{"role": …, "content": …}, …], "rejected": [ … ]}       kind "preference"

A file, plain or gzipped, is read in blocks of whole lines (`read_blocks`), so memory does not grow with it.
`parse_block` turns the lines of a block into typed records. Whatever is wrong becomes a `BadRecord`, which
reads `file:line: field: what is wrong`. Blank lines are no records and are passed over; fields that the
formats above do not name are ignored.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, get_args

import msgspec

from minimind.errors import UserError

Kind = Literal["pretrain", "conversation", "reasoning", "preference"]
AskedKind = Kind | Literal["auto"]  # what --kind takes; auto: `kind_of`
KINDS = ("auto", *get_args(Kind))
OnBadRecord = Literal["stop", "skip"]
Role = Literal["system", "user", "assistant"]

BLOCK_BYTES = 1 << 20
# Encoding one text takes about 120 bytes of memory for each of its bytes (tokenizers 0.23: 0.25 GB for 2 MiB,
# 1.0 GB for 8 MiB). 2 MiB is a novel of 700,000 Chinese characters on one line.
MAX_LINE_BYTES = 2 << 20

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB; split it into several records"

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # of a reasoning answer, in their order
TAG = re.compile(f"({'|'.join(TAGS)})")


class Message(TypedDict):
    role: Role
    content: str


class TextRecord(msgspec.Struct):
    text: str


class ConversationRecord(msgspec.Struct):
    conversations: list[Message]


class PreferenceRecord(msgspec.Struct):
    chosen: list[Message]
    rejected: list[Message]


T = TypeVar("T")
Record = TextRecord | ConversationRecord | PreferenceRecord
_DECODERS: dict[str, msgspec.json.Decoder] = {
    "pretrain": msgspec.json.Decoder(TextRecord),
    "conversation": msgspec.json.Decoder(ConversationRecord),
    "reasoning": msgspec.json.Decoder(ConversationRecord),
    "preference": msgspec.json.Decoder(PreferenceRecord),
}
ANYTHING = msgspec.json.Decoder()
ANY_OBJECT = msgspec.json.Decoder(dict[str, Any])  # for `decode_line`


class BadRecord(NamedTuple):
    """One thing that is wrong in a file. Lines count from 1.

    `used` tells of a flaw that costs no record when the reader goes on (a BOM, Windows line ends).
    """

    file: str
    line: int
    field: str
    reason: str
    used: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.reason}"

    def stop(self) -> UserError:
        """The error to raise when bad records are not skipped."""
        return UserError(f"{self}\n  Mend it, or go on in spite of such records: --on_bad_record skip")


class Block(NamedTuple):
    """Whole lines of a file: the number of the first one, their bytes, and how far the file has been read."""

    first_line: int
    data: bytes
    position: int

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number, line) of those that are not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line and not line.isspace():
                yield number, line


class InvalidLine(Exception):
    """A line that is no record of the kind asked for: `field` and `reason` as in `BadRecord`."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def read_records(
    path: str | Path,
    kind: Kind,
    *,
    on_bad_record: OnBadRecord = "stop",
    bad_records: list[BadRecord] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Yield (line number, record) in the order of the file.

    Raises `UserError` when the file cannot be opened or holds no usable record, and on the first bad record
    unless `on_bad_record` is "skip"; then bad records are left out and collected in `bad_records`.
    """
    usable, first = False, None
    for records, bad in parsed_blocks(path, kind):
        if bad and on_bad_record == "stop":
            # What stands before the bad line is good: the caller gets it first.
            yield from ((line, record) for line, record in records if line < bad[0].line)
            raise bad[0].stop()
        if bad_records is not None:
            bad_records.extend(bad)
        first = first or next((flaw for flaw in bad if not flaw.used), None)
        usable = usable or bool(records)
        yield from records
    if not usable:
        raise no_records(path, first)


def no_records(path: str | Path, first: BadRecord | None = None) -> UserError:
    """Args: first: what is wrong with the first record, where that is known."""
    why = f"; the first, in line {first.line}: {first.reason}" if first else ""
    return UserError(f"{path}: no usable record in this file{why}")


def open_file(path: str | Path) -> BufferedReader:
    """Open a data file for reading bytes. Raises `UserError` when that fails."""
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def unzipped(raw: BufferedReader) -> BufferedReader | gzip.GzipFile:
    """The bytes of an open data file, whether it is gzipped or not."""
    return gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP_MAGIC else raw


def read_blocks(path: str | Path) -> Iterator[Block | BadRecord]:
    """Cut a file into blocks of whole lines: about `BLOCK_BYTES`, and `MAX_LINE_BYTES` more for a long line.

    Flaws that no line can tell (of the whole file, a line too long to keep) come in between, in their place.
    """
    for block in _split_blocks(path):
        if isinstance(block, Block) and block.first_line == 1:
            yield from _flaws_of_file(str(path), block.data)
            block = block._replace(data=block.data.removeprefix(BOM))
        yield block


def _flaws_of_file(file: str, head: bytes) -> Iterator[BadRecord]:
    """Two habits of Windows editors. They are harmless here, so the records are used in spite of them."""
    if head.startswith(BOM):
        mend = "save it as UTF-8 without BOM, or: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE"
        yield BadRecord(file, 1, "file", f"begins with a byte order mark (BOM); {mend}", used=True)
    if head.partition(b"\n")[0].endswith(b"\r"):
        mend = "sed -i 's/\\r$//' FILE"
        yield BadRecord(file, 1, "file", f"has Windows line ends (CRLF); change them: {mend}", used=True)


def _split_blocks(path: str | Path) -> Iterator[Block | BadRecord]:
    file, line, buffer, in_long_line = str(path), 1, bytearray(), False
    with open_file(path) as raw, unzipped(raw) as stream:
        try:
            # read1 hands over what it has before a damaged place raises.
            while chunk := stream.read1(BLOCK_BYTES):
                buffer += chunk
                if in_long_line:
                    end = buffer.find(b"\n") + 1
                    del buffer[: end or len(buffer)]
                    in_long_line, line = not end, line + bool(end)
                if len(buffer) < BLOCK_BYTES:
                    continue
                if end := buffer.rfind(b"\n") + 1:
                    yield Block(line, bytes(buffer[:end]), raw.tell())
                    line += buffer.count(b"\n", 0, end)
                    del buffer[:end]
                elif len(buffer) > MAX_LINE_BYTES:
                    yield BadRecord(file, line, "line", TOO_LONG)
                    buffer.clear()
                    in_long_line = True
            damage = None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            damage = f"damaged gzip data ({error}); fetch the file again"
            del buffer[buffer.rfind(b"\n") + 1 :]  # half a line
        if buffer:
            yield Block(line, bytes(buffer), raw.tell())
        if damage:
            yield BadRecord(file, line + buffer.count(b"\n"), "file", damage)


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes] | BadRecord]:
    """(number, line) of those that are not blank; flaws that no line can tell come in between."""
    for block in read_blocks(path):
        if isinstance(block, BadRecord):
            yield block
        else:
            yield from block.lines()


def parse_block(block: Block, kind: Kind, file: str) -> tuple[list[tuple[int, Record]], list[BadRecord]]:
    """The records of a block as (line number, record), and what is wrong with the other lines."""
    records, bad = [], []
    for number, line in block.lines():
        try:
            records.append((number, parse_line(line, kind)))
        except InvalidLine as error:
            bad.append(BadRecord(file, number, error.field, error.reason))
    return records, bad


def parsed_blocks(path: str | Path, kind: Kind) -> Iterator[tuple[list[tuple[int, Record]], list[BadRecord]]]:
    """A file as `parse_block` takes its blocks; flaws that no line can tell come in between."""
    for block in read_blocks(path):
        yield ([], [block]) if isinstance(block, BadRecord) else parse_block(block, kind, str(path))


def decode_text(line: bytes) -> str:
    """A line as text. Raises `InvalidLine`."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidLine("line", TOO_LONG)
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8"
        raise InvalidLine("line", f"{place}; convert the file: {to_utf8(line)}") from None


def to_utf8(begin: bytes) -> str:
    """The command that converts a file with such bytes: there are two likely other ways to write Chinese."""
    utf16 = begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in begin
    return f"iconv -f {'UTF-16' if utf16 else 'GB18030'} -t UTF-8"


def decode_line(line: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The JSON of a line as `decoder` has it. Raises `InvalidLine`."""
    decode_text(line)  # msgspec does not look into the fields that it passes over
    try:
        return decoder.decode(line)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidLine("line", _why_no_json(line, error)) from None


def parse_line(line: bytes, kind: Kind) -> Record:
    """The record that a line holds. Raises `InvalidLine`."""
    record = decode_line(line, _DECODERS[kind])
    if kind == "pretrain":
        if not record.text or record.text.isspace():
            raise InvalidLine("text", "empty")
    elif kind == "preference":
        _check_pair(record)
    else:
        _check_messages("conversations", record.conversations)
        if kind == "reasoning":
            _check_reasoning(record.conversations)
    return record


def wrong_field(message: str) -> InvalidLine:
    """Split msgspec's "what - at `$.where`" into our field and reason."""
    what, _, where = message.partition(" - at `$")
    field = where.rstrip("`").lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        return InvalidLine(f"{field}.{missing[1]}".lstrip("."), "missing")
    if role := re.fullmatch(r"Invalid enum value '(.*)'", what):
        return InvalidLine(field, f"unknown role `{role[1][:40]}`; one of system, user, assistant")
    return InvalidLine(field or "line", what[0].lower() + what[1:])


def _why_no_json(line: bytes, error: Exception) -> str:
    """A reason a person can act on. The standard parser is slow, but says it better and knows the column."""
    try:
        json.dumps(json.loads(line.decode()), ensure_ascii=False).encode()
    except json.JSONDecodeError as reason:
        zeros = f"; it has zero bytes in it, perhaps: {to_utf8(line)}" if b"\0" in line else ""
        return f"broken JSON: {reason.msg.removesuffix(' at')} at column {reason.colno}{zeros}"
    except UnicodeEncodeError:
        return "half of a \\ud800–\\udfff pair, which is no character"
    except RecursionError:
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error}"


def _check_messages(field: str, messages: list[Message]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last; none of them empty."""
    turns = ("user", "assistant")
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if i >= first and role != turns[(i - first) % 2]:
            out_of_order = f"`{role}` where `{turns[(i - first) % 2]}` belongs"
            reason = "`system` may only come first" if role == "system" else out_of_order
            raise InvalidLine(f"{field}[{i}].role", reason)
        if not content or content.isspace():
            raise InvalidLine(f"{field}[{i}].content", "empty")
    if not messages or messages[-1]["role"] != "assistant":
        raise InvalidLine(field, "does not end with an answer of the assistant")


def _check_reasoning(messages: list[Message]) -> None:
    """Every answer has its four tags once and in order, and nothing but white space around them.

    There may be no thinking, as for questions that need none, but never no answer.
    """
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        field = f"conversations[{i}].content"
        # before, tag, thinking, tag, between, tag, answer, tag, after
        pieces = TAG.split(message["content"])
        if pieces[1::2] != TAGS or "".join(pieces[::4]).strip():
            reason = "is not <think>…</think> and <answer>…</answer>, once each, as reasoning is"
            raise InvalidLine(field, reason)
        if not pieces[6].strip():
            raise InvalidLine(field, "nothing between <answer> and </answer>")


def _check_pair(record: PreferenceRecord) -> None:
    """Both sides are conversations with the same messages but for the last answer."""
    chosen, rejected = record.chosen, record.rejected
    _check_messages("chosen", chosen)
    _check_messages("rejected", rejected)
    if len(chosen) != len(rejected):
        raise InvalidLine("rejected", f"has {len(rejected)} messages and `chosen` has {len(chosen)}")
    for i, (ours, theirs) in enumerate(zip(chosen[:-1], rejected[:-1], strict=True)):
        if ours != theirs:
            reason = "is not the message of `chosen`; only the last answer may differ"
            raise InvalidLine(f"rejected[{i}]", reason)
    if chosen[-1] == rejected[-1]:
        raise InvalidLine(f"rejected[{len(rejected) - 1}].content", "the same answer as in `chosen`")


def kind_of(path: Path, asked: AskedKind = "auto") -> Kind:
    """`asked`, or for "auto" what the first record is.

    Raises: UserError where that has none of the known fields.
    """
    if asked != "auto":
        return asked
    first = None
    for item in read_lines(path):
        if isinstance(item, BadRecord):
            first = first or (None if item.used else item)
            continue
        try:
            record = decode_line(item[1], ANYTHING)
        except InvalidLine as error:  # a bad record, and the next one may tell
            first = first or BadRecord(str(path), item[0], error.field, error.reason)
            continue
        fields = record if isinstance(record, dict) else {}
        if "text" in fields:
            return "pretrain"
        if "chosen" in fields or "rejected" in fields:
            return "preference"
        if "conversations" in fields:
            return "reasoning" if TAG.search(str(fields["conversations"])) else "conversation"
        break
    else:
        raise no_records(path, first)
    raise UserError(
        f"{path}: the first record has no field text, conversations or chosen, by which to tell its kind; "
        f"mend it (dataset/README.md shows how): `minimind data check {path} --kind …` names its flaws"
    )


def chats_of(record: ConversationRecord | PreferenceRecord) -> list[list[Message]]:
    """The conversation of a record, or both of a pair."""
    if isinstance(record, PreferenceRecord):
        return [record.chosen, record.rejected]
    return [record.conversations]


def text_of(record: Record) -> str:
    """All that a record says. The two answers of a pair are different, so both are in it."""
    if isinstance(record, TextRecord):
        return record.text
    first, *others = chats_of(record)
    return "\n".join(message["content"] for message in first + [chat[-1] for chat in others])
