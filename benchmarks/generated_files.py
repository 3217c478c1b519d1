"""Data files of any size, made from a small one, and what it takes to prepare them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.side_by_side import once_in_own_process
from benchmarks.used_memory import with_peak_memory
from minimind.data.epochs import Epochs
from minimind.data.holdout import split_holdout
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.data.segments import make_segments
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

ROOM = 1.7  # of a generated file's size, for itself and its tokens
SOURCE_BYTES = 100_000_000  # of the file that is used again and again, held in memory
PACKING_INTERVAL = 0.005  # seconds between looks at the memory; packing a small file takes some tenths


def check_room(folder: Path, gigabytes: float) -> None:
    if not folder.is_dir():
        raise UserError(f"--work_dir {folder} is no folder")
    needed, free = ROOM * gigabytes, shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise UserError(
            f"a file of {gigabytes:g} GB and its tokens need {needed:.2f} GB, but {free:.2f} GB are "
            f"free in {folder.absolute()}; name a folder with more room (--work_dir) or smaller --sizes_gb"
        )


def measure_generated(source: Path, gigabytes: float, max_seq_len: int, folder: Path) -> dict[str, Any]:
    """`measure` of a file that is deleted afterwards, in a process of its own."""
    began = time.perf_counter()
    path, cache = folder / f"generated_{gigabytes:g}.jsonl", folder / f"cache_{gigabytes:g}"
    try:
        generate(source, path, gigabytes)
        measured = once_in_own_process(measure, path, max_seq_len, cache)
        return measured | {"seconds_in_all": time.perf_counter() - began}
    finally:
        path.unlink(missing_ok=True)
        shutil.rmtree(cache, ignore_errors=True)


def generate(source: Path, path: Path, gigabytes: float) -> Path:
    """A file of that size, the lines of `source` again and again, each made another by a number in front."""
    lines = first_lines(source)
    if not lines:
        raise UserError(f"{source} has no records")
    size = number = 0
    with path.open("wb") as file:
        while size < gigabytes * 1e9:
            size += file.write(b'{"text":"%d %b\n' % (number, lines[number % len(lines)]))
            number += 1
    return path


def first_lines(source: Path) -> list[bytes]:
    """What follows `{"text":"` in the first lines."""
    lines: list[bytes] = []
    size = 0
    for _, record in read_records(source, "pretrain"):
        lines.append(msgspec.json.encode({"text": record.text}).removeprefix(b'{"text":"'))
        size += len(lines[-1])
        if size >= SOURCE_BYTES:
            break
    return lines


def measure(path: Path, max_seq_len: int, cache: Path) -> dict[str, Any]:
    """Seconds, megabytes and counts of one preparation from an empty cache."""
    tokenizer = Tokenizer.load()
    cpu_before, began = sum(os.times()[:4]), time.perf_counter()
    store, peak = with_peak_memory(
        lambda: prepare(path, "pretrain", tokenizer, cache_dir=cache, progress=False)
    )
    prepared = time.perf_counter()
    packed, packing_peak = with_peak_memory(
        lambda: packed_rows(store, tokenizer, max_seq_len), PACKING_INTERVAL
    )
    ended = time.perf_counter()
    return {
        "file_mb": path.stat().st_size / 1e6,
        "text_mb": store.meta["utf8_bytes"] / 1e6,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "rows": sum(len(epochs.rows) for epochs in packed),
        "prepare_s": prepared - began,
        "pack_s": ended - prepared,
        "cpu_s": sum(os.times()[:4]) - cpu_before,  # of workers too; not for what else the machine does
        "mb_per_s": store.meta["utf8_bytes"] / 1e6 / (ended - began),
        "prepare_peak_mb": peak / 1e6,
        "pack_peak_mb": packing_peak / 1e6,
        "peak_memory_mb": max(peak, packing_peak) / 1e6,
    }


def packed_rows(store: TokenStore, tokenizer: Tokenizer, max_seq_len: int) -> list[Epochs]:
    """What a run makes of a store before its first step: rows to train on, and rows held out."""
    parts = []
    for documents in split_holdout(store):
        segments, _ = make_segments(store, documents, max_seq_len, tokenizer.eos_id)
        parts.append(Epochs(segments, max_seq_len, seed=0))
        parts[-1].draw(0, 0, min(32, len(parts[-1].rows)))
    return parts
