"""How fast a JSONL file becomes packed rows beside `datasets`, and in how much memory.

    python -m benchmarks.prepare_speed dataset/pretrain_hq.jsonl
    python -m benchmarks.prepare_speed --rounds 0                    the memory alone: 3 minutes at 33 MB/s

First the whole way from the file to rows, in turn with what users of `datasets` write: `load_dataset`, a
`map` that tokenises, a `map` that joins and cuts. Ours hashes, checks every record and keeps documents apart
besides. Every round begins with an empty cache folder; imports are not counted. Beside them stands the
`tokenizers` library alone, given texts in memory on all cores.

Then our memory while tokenising and while packing, with files of growing size: the first 100 MB of the given
one again and again, each line with its number in front. Memory is that of this process and its workers, pages
they share counted once, at the worst moment. Before each file it is said how long it will take.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.comparisons import OURS, median_and_spread, preparation
from benchmarks.datasets_peer import datasets_rows, encoder
from benchmarks.generated_files import check_room, measure_generated, packed_rows
from benchmarks.side_by_side import Work, in_own_process, rates_in_turn, write_results
from minimind.data.prepare import prepare
from minimind.data.records import read_records
from minimind.environment import available_cores
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT
from minimind.tokenizer import Tokenizer

GOAL = 3.0  # times as fast as the fastest way with `datasets`
ALONE = "tokenizers alone, texts in memory"
PEERS = {  # what encodes, and in how many processes
    "datasets.map, transformers": ("transformers", available_cores()),
    "datasets.map, tokenizers": ("tokenizers", available_cores()),
    "datasets.map, tokenizers' threads": ("tokenizers", None),
}


@dataclass(frozen=True)
class BenchmarkOptions:
    path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file of texts", positional=True)
    rounds: int = flag(
        3, "times that each prepares the file, after one that is not counted; 0: no comparison"
    )
    sizes_gb: tuple[float, ...] = flag((0.1, 0.5, 4.0), "sizes of the generated files in GB")
    max_seq_len: int = flag(512, "length of a row in tokens")
    work_dir: Path = flag(
        Path(tempfile.gettempdir()), "folder on a disk with room for the largest file and its tokens"
    )
    json: Path = flag(
        ROOT / "benchmarks/results/prepare_speed.json",
        "where the comparison is written; the memory goes to prepare_memory.json beside it",
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    if not options.path.is_file():
        raise UserError(f"there is no {options.path}; name a JSONL file of texts")
    if options.rounds < 0:
        raise UserError(f"--rounds is {options.rounds}; it must be 0 or more")
    if min(options.sizes_gb) <= 0:
        raise UserError(f"--sizes_gb has {min(options.sizes_gb):g}; sizes must be above 0")
    check_room(options.work_dir, max(options.sizes_gb))
    with tempfile.TemporaryDirectory(dir=options.work_dir.absolute()) as name:
        if options.rounds:
            report_speed(options, rates_in_turn(rivals(options, Path(name)), options.rounds))
        report_memory(options, measured_sizes(options, Path(name)))
    return 0


def measured_sizes(options: BenchmarkOptions, folder: Path) -> list[dict[str, Any]]:
    sizes: list[dict[str, Any]] = []
    for gigabytes in options.sizes_gb:
        if sizes:  # time is proportional to size
            seconds = sizes[-1]["seconds_in_all"] / sizes[-1]["file_mb"] * 1000 * gigabytes
            print(f"{1000 * gigabytes:,.0f} MB: about {seconds:,.0f} s to go", flush=True)
        sizes.append(measure_generated(options.path, gigabytes, options.max_seq_len, folder))
        shown = sizes[-1]
        print(
            f"{shown['file_mb']:,.0f} MB: {shown['mb_per_s']:.1f} MB/s of text; memory "
            f"{shown['prepare_peak_mb']:,.0f} MB to tokenise, {shown['pack_peak_mb']:,.0f} MB to pack; "
            f"{shown['seconds_in_all']:,.0f} s",
            flush=True,
        )
    return sizes


def rivals(options: BenchmarkOptions, folder: Path) -> dict[str, Work]:
    """Each returns the megabytes of text that it has prepared."""
    path, length = options.path, options.max_seq_len
    peers = {name: in_own_process(with_datasets, path, length, folder, *way) for name, way in PEERS.items()}
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


def with_datasets(path: Path, max_seq_len: int, folder: Path, kind: str, num_proc: int | None) -> Work:
    rows, megabytes = datasets_rows(path, max_seq_len, kind, num_proc), text_megabytes(path)

    def work() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            rows(Path(cache))
        return megabytes

    return work


def tokenizers_alone(path: Path, records: int = 10_000) -> Work:
    encode = encoder("tokenizers")
    texts = [record.text for _, record in itertools.islice(read_records(path, "pretrain"), records)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def work() -> float:
        for i in range(0, len(texts), 1000):
            encode(texts[i : i + 1000])
        return megabytes

    return work


def report_speed(options: BenchmarkOptions, rates: dict[str, list[float]]) -> None:
    """Print the comparison, and write it beside the machine it was measured on."""
    comparison = preparation(rates, GOAL)
    ratio = comparison.times(OURS).median
    table = Table("", "MB/s of text", "times the fastest datasets", title=f"{options.path.name} to rows")
    for name, values in rates.items():
        table.add_row(name, median_and_spread(values, 1), f"{comparison.times(name).median:.2f}")
    Console().print(table)
    met = "met" if ratio >= GOAL else "missed"
    print(f"{ratio:.2f} times as fast as the fastest way with datasets (goal: {GOAL:g}, {met})")
    results = {
        "data": options.path.name,
        "max_seq_len": options.max_seq_len,
        "mb_per_s": rates,
        "ratio": ratio,
        "goal": GOAL,
    }
    write_results(options.json, options, results)


def report_memory(options: BenchmarkOptions, sizes: list[dict[str, Any]]) -> None:
    """Print the memory of both parts, and write it beside the machine it was measured on."""
    table = Table("file", "MB/s of text", "memory while tokenising", "while packing", "packing")
    for size in sizes:
        peaks = (f"{size[name]:,.0f} MB" for name in ("prepare_peak_mb", "pack_peak_mb"))
        table.add_row(
            f"{size['file_mb']:,.0f} MB", f"{size['mb_per_s']:.1f}", *peaks, f"{size['pack_s']:.1f} s"
        )
    Console().print(table)
    results = {"data": options.path.name, "max_seq_len": options.max_seq_len, "sizes": sizes}
    write_results(options.json.with_name("prepare_memory.json"), options, results)


if __name__ == "__main__":
    run_cli(main)
