"""Data files of any size, made from a small one, and what it takes to prepare them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.side_by_side import once_in_own_process
from benchmarks.used_memory import with_peak_memory
from minimind.data.packing import Packing, make_segments
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

ROOM = 1.7  # of a generated file's size, for itself and its tokens


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
    path = generate(source, folder / f"generated_{gigabytes:g}.jsonl", gigabytes)
    cache = folder / f"cache_{gigabytes:g}"
    try:
        return once_in_own_process(measure, path, max_seq_len, cache)
    finally:
        path.unlink()
        shutil.rmtree(cache, ignore_errors=True)


def generate(source: Path, path: Path, gigabytes: float) -> Path:
    """A file of that size, no two lines of which are the same."""
    with path.open("wb") as file:
        for number, text in enumerate(endless(source)):
            if file.tell() >= gigabytes * 1e9:
                return path
            file.write(msgspec.json.encode({"text": f"{number} {text}"}) + b"\n")
    raise UserError(f"{source} has no records")


def endless(source: Path) -> Iterator[str]:
    """The texts of a file again and again; none where it has none."""
    found = True
    while found:
        found = False
        for _, record in read_records(source, "pretrain"):
            found = True
            yield record.text


def measure(path: Path, max_seq_len: int, cache: Path) -> dict[str, Any]:
    """Seconds, megabytes and counts of one preparation from an empty cache."""
    tokenizer = Tokenizer.load()
    cpu_before, began = sum(os.times()[:4]), time.perf_counter()
    store, peak = with_peak_memory(
        lambda: prepare(path, "pretrain", tokenizer, cache_dir=cache, progress=False)
    )
    prepared = time.perf_counter()
    packed, packing_peak = with_peak_memory(lambda: packed_rows(store, tokenizer, max_seq_len))
    ended = time.perf_counter()
    return {
        "file_mb": path.stat().st_size / 1e6,
        "text_mb": store.meta["utf8_bytes"] / 1e6,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "rows": len(packed.rows),
        "prepare_s": prepared - began,
        "pack_s": ended - prepared,
        "cpu_s": sum(os.times()[:4]) - cpu_before,  # of workers too; not for what else the machine does
        "mb_per_s": store.meta["utf8_bytes"] / 1e6 / (ended - began),
        "prepare_peak_mb": peak / 1e6,
        "pack_peak_mb": packing_peak / 1e6,
        "peak_memory_mb": max(peak, packing_peak) / 1e6,
    }


def packed_rows(store: TokenStore, tokenizer: Tokenizer, max_seq_len: int) -> Packing:
    segments, _ = make_segments(store, np.arange(store.num_documents), max_seq_len, tokenizer.eos_id)
    packed = Packing(segments, max_seq_len, seed=0)
    packed.row(epoch=0, index=0)
    return packed
