"""How fast a JSONL file becomes packed rows beside `datasets`, and in how much memory.

    python -m benchmarks.prepare_speed dataset/pretrain_hq.jsonl

First the whole way from the file to rows, in turn with what users of `datasets` write: `load_dataset`, a
`map` that tokenises, a `map` that joins and cuts. Ours hashes, checks every record and keeps documents apart
besides. Every round begins with an empty cache folder; imports are not counted. Beside them stands the
`tokenizers` library alone, given texts in memory on all cores.

Then our memory, with files of growing size: the lines of the given one again and again, each with its number
in front. Memory is that of this process and its workers, pages they share counted once, at the worst moment.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.datasets_peer import datasets_rows
from benchmarks.figures import Line, Panel, draw
from benchmarks.side_by_side import (
    Work,
    in_own_process,
    median_and_spread,
    once_in_own_process,
    rates_in_turn,
    write_results,
)
from benchmarks.used_memory import with_peak_memory
from minimind.data.packing import Packing, make_segments
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.data.store import TokenStore
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT
from minimind.tokenizer import Tokenizer

GOAL = 3.0  # times as fast as the faster way with `datasets`
ROOM = 1.7  # of a generated file's size, for itself and its tokens
OURS, ALONE = "minimind", "tokenizers alone, texts in memory"
PEERS = {"datasets.map, transformers": "transformers", "datasets.map, tokenizers": "tokenizers"}


@dataclass(frozen=True)
class BenchmarkOptions:
    path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file of texts", positional=True)
    rounds: int = flag(3, "times that each prepares the file, after one that is not counted")
    sizes_gb: tuple[float, ...] = flag((0.1, 0.25, 1.0, 4.0), "sizes of the generated files in GB")
    max_seq_len: int = flag(512, "length of a row in tokens")
    work_dir: Path = flag(Path(), "folder on a disk with room for the largest file and its tokens")
    json: Path = flag(ROOT / "benchmarks/results/prepare_speed.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    if not options.path.is_file():
        raise UserError(f"there is no {options.path}; name a JSONL file of texts")
    check_room(options.work_dir, max(options.sizes_gb))
    with tempfile.TemporaryDirectory(dir=options.work_dir.absolute()) as name:
        folder = Path(name)
        rates = rates_in_turn(rivals(options, folder), options.rounds)
        sizes = []
        for gigabytes in options.sizes_gb:
            sizes.append(measure_generated(options.path, gigabytes, options.max_seq_len, folder))
            shown = sizes[-1]
            print(
                f"{shown['file_mb']:,.0f} MB: {shown['mb_per_s']:.1f} MB/s of text, "
                f"{shown['peak_memory_mb']:,.0f} MB of memory",
                flush=True,
            )
    report(options, rates, sizes)
    return 0


def check_room(folder: Path, gigabytes: float) -> None:
    if not folder.is_dir():
        raise UserError(f"--work_dir {folder} is no folder")
    needed, free = ROOM * gigabytes, shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise UserError(
            f"a file of {gigabytes:g} GB and its tokens need {needed:.2f} GB, but {free:.2f} GB are "
            f"free in {folder.absolute()}; name a folder with more room (--work_dir) or smaller --sizes_gb"
        )


# Speed, side by side


def rivals(options: BenchmarkOptions, folder: Path) -> dict[str, Work]:
    """Each returns the megabytes of text that it has prepared."""
    path, length = options.path, options.max_seq_len
    peers = {name: in_own_process(with_datasets, path, length, folder, kind) for name, kind in PEERS.items()}
    return {
        OURS: in_own_process(ours, path, length, folder),
        **peers,
        ALONE: in_own_process(tokenizers_alone, path),
    }


def text_megabytes(path: Path) -> float:
    return sum(len(record.text.encode()) for _, record in read_records(path, "pretrain")) / 1e6


def ours(path: Path, max_seq_len: int, folder: Path) -> Work:
    tokenizer = Tokenizer.load()

    def work() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            store = prepare(path, "pretrain", tokenizer, cache_dir=cache, progress=False)
            packed_rows(store, tokenizer, max_seq_len)
        return store.meta["utf8_bytes"] / 1e6

    return work


def packed_rows(store: TokenStore, tokenizer: Tokenizer, max_seq_len: int) -> Packing:
    segments, _ = make_segments(store, np.arange(store.num_documents), max_seq_len, tokenizer.eos_id)
    packed = Packing(segments, max_seq_len, seed=0)
    packed.row(epoch=0, index=0)
    return packed


def with_datasets(path: Path, max_seq_len: int, folder: Path, kind: str) -> Work:
    rows, megabytes = datasets_rows(path, max_seq_len, kind), text_megabytes(path)

    def work() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            rows(Path(cache))
        return megabytes

    return work


def tokenizers_alone(path: Path, records: int = 10_000) -> Work:
    tokenizer = Tokenizer.load()
    texts = [record.text for _, record in itertools.islice(read_records(path, "pretrain"), records)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def work() -> float:
        for i in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[i : i + 1000])
        return megabytes

    return work


# Memory, with files of growing size


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


def report(options: BenchmarkOptions, rates: dict[str, list[float]], sizes: list[dict[str, Any]]) -> None:
    """Print both comparisons, draw the memory, and write all beside the machine it was measured on."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians[OURS] / max(medians[name] for name in PEERS)
    table = Table("", "MB/s of text", "times ours", title=f"{options.path.name} to rows")
    for name, median in medians.items():
        table.add_row(name, median_and_spread(rates[name], 1), f"{median / medians[OURS]:.2f}")
    Console().print(table)
    met = "met" if ratio >= GOAL else "missed"
    print(f"{ratio:.2f} times as fast as the faster way with datasets (goal: {GOAL:g}, {met})")

    table = Table("file", "MB/s of text", "memory while tokenising", "while packing")
    for size in sizes:
        peaks = (f"{size[name]:,.0f} MB" for name in ("prepare_peak_mb", "pack_peak_mb"))
        table.add_row(f"{size['file_mb']:,.0f} MB", f"{size['mb_per_s']:.1f}", *peaks)
    Console().print(table)
    panel = Panel(
        "Preparation of a data file",
        "size of the file, MB",
        [size["file_mb"] for size in sizes],
        Line("peak memory, MB", [size["peak_memory_mb"] for size in sizes]),
        Line("MB of text a second", [size["mb_per_s"] for size in sizes]),
    )
    draw(options.json.with_name("prepare_memory.svg"), [panel], columns=1)
    results = {
        "data": options.path.name,
        "max_seq_len": options.max_seq_len,
        "mb_per_s": rates,
        "ratio": ratio,
        "goal": GOAL,
        "sizes": sizes,
    }
    sizes_gb = " ".join(f"{size:g}" for size in options.sizes_gb)
    command = f"python -m benchmarks.prepare_speed --rounds {options.rounds} --sizes_gb {sizes_gb}"
    write_results(options.json, command, results)


if __name__ == "__main__":
    run_cli(main)
