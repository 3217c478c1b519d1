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

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_args

import msgspec

from minimind.data.lines import (
    MAX_LINE_BYTES,
    TOO_LONG,
    BadRecord,
    Block,
    no_records,
    read_blocks,
    read_lines,
    to_utf8,
)
from minimind.errors import UserError

Kind = Literal["pretrain", "conversation", "reasoning", "preference"]
AskedKind = Kind | Literal["auto"]  # what --kind takes; auto: `kind_of`
KINDS = ("auto", *get_args(Kind))
OnBadRecord = Literal["stop", "skip"]
Role = Literal["system", "user", "assistant"]

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
