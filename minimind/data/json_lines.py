"""The records of a file as JSON, one by one: the lines of a JSONL file, or the items of a JSON array.

Other tools write either. Memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from minimind.data.lines import (
    BLOCK_BYTES,
    BOM,
    MAX_LINE_BYTES,
    TOO_LONG,
    BadRecord,
    open_file,
    read_lines,
    to_utf8,
    unzipped,
)
from minimind.errors import UserError

BETWEEN = " \t\r\n,"  # what stands between items


def read_items(path: Path) -> Iterator[tuple[int, bytes] | BadRecord]:
    """(line that it begins on, JSON) of each record; blank lines are none.

    Flaws that no record can tell come in between. Raises: UserError when the file cannot be read, or an array
    is broken, since where its next item begins cannot be known.
    """
    if is_array(path):
        yield from _array_items(path)
    else:
        yield from read_lines(path)


def is_array(path: Path) -> bool:
    """Whether the file begins with a `[`."""
    with open_file(path) as raw, unzipped(raw) as stream:
        try:
            head = stream.read(BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return False  # the damage is told where lines are read
        return head.removeprefix(BOM).lstrip().startswith(b"[")


def _array_items(path: Path) -> Iterator[tuple[int, bytes]]:
    decoder = json.JSONDecoder()
    chunks = _decoded(path)
    text = next(chunks).removeprefix("\ufeff")
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        while at < len(text) and text[at] in BETWEEN:
            line += text[at] == "\n"
            at += 1
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip() or "".join(chunks).strip():
                raise UserError(f"{path}:{line}: something follows the ] of the array; mend the file")
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            more = next(chunks, "") if len(text) - at <= MAX_LINE_BYTES else ""
            if more:  # perhaps only half of the item is here
                text, at = text[at:] + more, 0
                continue
            raise _broken(path, text, at, line, error) from None
        yield line, text[at:end].encode()
        line += text.count("\n", at, end)
        at = end


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_file(path) as raw, unzipped(raw) as stream:
        try:
            while chunk := stream.read(BLOCK_BYTES):
                yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8; convert it: {to_utf8(error.object[:4])}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip data ({error}); fetch the file again") from None


def _broken(path: Path, text: str, at: int, line: int, error: Exception) -> UserError:
    if len(text) - at > MAX_LINE_BYTES:
        reason = TOO_LONG
    elif at == len(text):
        reason = "the array is cut off: its ] is missing"
    else:
        line += text.count("\n", at, getattr(error, "pos", at))
        reason = f"broken JSON: {getattr(error, 'msg', 'nested too deeply')}"
    return UserError(f"{path}:{line}: {reason}; what follows cannot be read")
