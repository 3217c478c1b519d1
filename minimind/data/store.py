"""The tokenised form of a data file: a folder of flat binary arrays, mapped into memory and never loaded.

    tokens.bin        uint16 or uint32, all documents one after the other
    weights.bin       uint8 for every token: 1 where it is a target, 2 where it is one and part of a tag of a
                      reasoning answer, 0 where not. Not there for pretraining, where all tokens are targets
    offsets.bin       int64, documents + 1 of them: document i is tokens[offsets[i]:offsets[i + 1]]
    lines.bin         int64 for every document: its line in the JSONL file, from 1
    fingerprints.bin  uint32 for every document: CRC-32 of the tokens of its record
    bad_records.jsonl what was skipped, and why; only if something was
    meta.json         what was read, with what, and the size of every file

A preference pair is two documents: the chosen one at 2i, the rejected one at 2i + 1.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind.data.encode import EncodedBlock, token_dtype
from minimind.data.lines import BadRecord
from minimind.data.records import Kind

FORMAT_VERSION = 2
BAD_RECORDS = "bad_records.jsonl"
META = "meta.json"


@dataclass(frozen=True)
class TokenStore:
    """Read-only arrays over the files of `folder`; pages of them are in memory only while they are used."""

    folder: Path
    meta: dict[str, Any]
    tokens: np.ndarray  # (num_tokens,) uint16 or uint32
    weights: np.ndarray | None  # (num_tokens,) uint8
    offsets: np.ndarray  # (num_documents + 1,) int64
    lines: np.ndarray  # (num_documents,) int64
    fingerprints: np.ndarray  # (num_documents,) uint32

    @property
    def kind(self) -> Kind:
        return self.meta["kind"]

    @property
    def documents_per_record(self) -> int:
        return 2 if self.kind == "preference" else 1

    @property
    def record_offsets(self) -> np.ndarray:
        """(records + 1,) int64: where the tokens of each record begin."""
        return self.offsets[:: self.documents_per_record]

    @property
    def record_lines(self) -> np.ndarray:
        """(records,) int64"""
        return self.lines[:: self.documents_per_record]

    @property
    def num_documents(self) -> int:
        return len(self.lines)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def documents_at(self, starts: np.ndarray) -> np.ndarray:
        """The document that each of these tokens belongs to, (k,) int64."""
        return np.searchsorted(self.offsets, starts, side="right") - 1

    def release(self) -> None:
        """Let go of the pages read so far; what is used again is read again."""
        for array in (self.tokens, self.weights, self.offsets, self.lines, self.fingerprints):
            if array is not None and isinstance(array.base, np.memmap):
                memmap: Any = array.base
                memmap.base.madvise(mmap.MADV_DONTNEED)  # of the mmap below it

    def bad_records(self) -> Iterator[BadRecord]:
        """What was wrong in the data file, from `bad_records.jsonl`."""
        if BAD_RECORDS in self.meta["files"]:
            with (self.folder / BAD_RECORDS).open(encoding="utf-8") as file:
                for line in file:
                    yield BadRecord(**json.loads(line))

    @classmethod
    def open(cls, folder: Path) -> TokenStore | None:
        """Map the files of `folder`; None if there is none or one of its files has not its full length."""
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION:
                return None
            if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

        def array(name: str, dtype: str | np.dtype | type[np.uint8]) -> np.ndarray:
            return np.asarray(np.memmap(folder / f"{name}.bin", dtype, "r"))  # a plain array slices faster

        return cls(
            folder=folder,
            meta=meta,
            tokens=array("tokens", token_dtype(meta["vocab_size"])),
            weights=array("weights", np.uint8) if "weights.bin" in meta["files"] else None,
            offsets=array("offsets", "<i8"),
            lines=array("lines", "<i8"),
            fingerprints=array("fingerprints", "<u4"),
        )


class StoreWriter:
    """Appends blocks to the files of a store in a new folder; `finish` makes them durable."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        folder.mkdir(parents=True)
        names = ["tokens", "offsets", "lines", "fingerprints"] + ["weights"] * (meta["kind"] != "pretrain")
        self._folder = folder
        self._meta = {"format_version": FORMAT_VERSION, **meta}
        self._files = {f"{name}.bin": (folder / f"{name}.bin").open("wb") for name in names}
        self._files["offsets.bin"].write(np.zeros(1, "<i8"))
        self.counts = dict.fromkeys(
            ("num_documents", "num_tokens", "num_target_tokens", "utf8_bytes", "skipped"), 0
        )

    def add(self, block: EncodedBlock) -> None:
        counts = self.counts
        arrays = {
            "tokens.bin": block.tokens,
            "weights.bin": block.weights,
            "offsets.bin": counts["num_tokens"] + block.lengths.cumsum(),
            "lines.bin": block.lines,
            "fingerprints.bin": block.fingerprints,
        }
        for name, array in arrays.items():
            if array is not None:
                self._files[name].write(array)
        targets = (
            len(block.tokens) - len(block.lengths)
            if block.weights is None
            else np.count_nonzero(block.weights)
        )
        counts["num_documents"] += len(block.lengths)
        counts["num_tokens"] += len(block.tokens)
        counts["num_target_tokens"] += int(targets)
        counts["utf8_bytes"] += block.utf8_bytes

    def add_bad_record(self, bad: BadRecord) -> None:
        if BAD_RECORDS not in self._files:
            self._files[BAD_RECORDS] = (self._folder / BAD_RECORDS).open("wb")
        self._files[BAD_RECORDS].write(json.dumps(bad._asdict()).encode() + b"\n")
        self.counts["skipped"] += not bad.used

    def finish(self) -> None:
        sizes = {name: file.tell() for name, file in self._files.items()}
        meta = {**self._meta, **self.counts, "files": sizes}
        self._files[META] = (self._folder / META).open("wb")
        self._files[META].write(json.dumps(meta, indent=1).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
