"""How fast a JSONL file becomes packed rows, and in how much memory.

    python -m benchmarks.prepare_speed dataset/pretrain_hq.jsonl
    python -m benchmarks.prepare_speed dataset/pretrain_hq.jsonl --generate_gb 2

The second form first writes a file of that size, the lines of the given one again and again, each with its
number in front. Times are of the whole way: hash, read, check, tokenise, write, map, pack. Beside them stands
the `tokenizers` library alone, given the texts in memory on the same cores. Memory is resident memory summed
over this process and its workers, pages they share counted for each, at the worst moment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from minimind.data.packing import Packing, make_segments
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.environment import environment
from minimind.errors import run_cli
from minimind.paths import DATASET_DIR, ROOT
from minimind.tokenizer import Tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "prepare_speed.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, nargs="?", default=DATASET_DIR / "pretrain_hq.jsonl")
    parser.add_argument("--generate_gb", type=float, default=0)
    parser.add_argument("--max_seq_len", type=int, default=512)
    options = parser.parse_args()
    tokenizer = Tokenizer.load()

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = options.path
        if options.generate_gb:
            path = generate(path, Path(folder) / "generated.jsonl", options.generate_gb)
        result = {
            "file": path.name,
            "file_mb": path.stat().st_size / 1e6,
            "load_average_before": os.getloadavg()[0],
            **measure(path, tokenizer, options.max_seq_len, Path(folder)),
            "tokenizers_alone_mb_per_s": tokenizers_alone(options.path, tokenizer),
            "max_seq_len": options.max_seq_len,
            "machine": environment(),
        }
    show(result)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[result["file"]] = result
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def tokenizers_alone(path: Path, tokenizer: Tokenizer, records: int = 10_000) -> float:
    """MB of text a second of `encode_batch` on all cores."""
    texts = [record.text for _, record in itertools.islice(read_records(path, "pretrain"), records)]
    start = time.perf_counter()
    for i in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[i : i + 1000])
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - start)


def generate(source: Path, path: Path, gigabytes: float) -> Path:
    numbers = itertools.count()
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < gigabytes * 1e9:
            for _, record in read_records(source, "pretrain"):
                file.write(json.dumps({"text": f"{next(numbers)} {record.text}"}, ensure_ascii=False) + "\n")
    return path


def measure(path: Path, tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> dict:
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    store, peak = with_peak_memory(lambda: prepare(path, "pretrain", tokenizer, cache_dir=folder / "cache"))
    prepared = time.perf_counter()
    segments, report = make_segments(store, np.arange(store.num_documents), max_seq_len, tokenizer.eos_id)
    packed = Packing(segments, max_seq_len, seed=0)
    packed.row(epoch=0, index=0)
    end = time.perf_counter()
    return {
        "text_mb": store.meta["utf8_bytes"] / 1e6,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "prepare_s": prepared - start,
        "pack_s": end - prepared,
        "cpu_s": sum(os.times()[:4])
        - cpu_start,  # of workers too: does not depend on who else uses the cores
        "mb_per_s": store.meta["utf8_bytes"] / 1e6 / (end - start),
        "peak_memory_mb": peak / 1e6,
        "rows": len(packed.rows),
        "padding": float(1 - segments.lengths.sum() / (len(packed.rows) * max_seq_len)),
        "documents_split": report.split,
    }


def with_peak_memory(work: Callable) -> tuple:
    """What `work` returns, and the most bytes that were resident meanwhile."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return work(), peak
    finally:
        done.set()
        watcher.join()


def resident_bytes() -> int:
    """Of this process and its children, from /proc."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in ["self", *children]:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it has just ended
            continue
    return total


def show(result: dict) -> None:
    table = Table("measure", "value", title=f"{result['file']}: from JSONL to packed rows")
    for name, value in result.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
