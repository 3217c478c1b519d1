"""A data file as blocks of whole lines, and what is wrong with it as a whole.

Memory holds a block, and of a line no more than `MAX_LINE_BYTES`.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from minimind.errors import UserError

BLOCK_BYTES = 1 << 20
# Encoding one text takes about 120 bytes of memory for each of its bytes (tokenizers 0.23: 0.25 GB for 2 MiB,
# 1.0 GB for 8 MiB). 2 MiB is a novel of 700,000 Chinese characters on one line.
MAX_LINE_BYTES = 2 << 20
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB; split it into several records"


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


def to_utf8(begin: bytes) -> str:
    """The command that converts a file with such bytes: there are two likely other ways to write Chinese."""
    utf16 = begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in begin
    return f"iconv -f {'UTF-16' if utf16 else 'GB18030'} -t UTF-8"
