"""Makes each fault for real on very small trainings, and compares what comes out with an undisturbed run.

    python -m faults                      all of them, about a quarter of an hour on 2 cores
    python -m faults --only kill watchdog
    python -m faults --data_path dataset/pretrain_hq.jsonl

Prints a line for each fault and ends with 1 when one fails; the results are in `faults/results.json`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from faults import signals, storage, workers
from faults.runs import Lab
from minimind.data.records import read_records
from minimind.environment import environment
from minimind.errors import run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT

FAULTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "kill": signals.kill,
    "stop": signals.stop,
    "stop_two": signals.stop_two,
    "worker": workers.worker_killed,
    "watchdog": workers.worker_hangs,
    "disk": storage.disk_fills,
    "disk_first": storage.disk_full_from_the_first_save,
    "deleted": storage.folder_deleted,
    "damage": storage.damaged_checkpoints,
    "soak": signals.soak,
}
TEXTS = 400


@dataclass(frozen=True)
class FaultOptions:
    only: tuple[str, ...] = flag((), f"which faults; without it all: {' '.join(FAULTS)}")
    data_path: Path | None = flag(None, "JSONL of texts; without it pretrain_hq.jsonl or made-up ones")
    seed: int = flag(0, "seed of the moments of faults")
    json: Path = flag(ROOT / "faults/results.json", "where the results of all faults are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(FaultOptions, argv, __doc__)
    results, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = Lab(Path(folder), write_texts(options.data_path, Path(folder) / "texts.jsonl"), options.seed)
        for name in options.only or FAULTS:
            results[name] = examine(FAULTS[name], lab)
            shown = ", ".join(f"{key} {value}" for key, value in results[name].items())
            print(f"{name:<12} {shown}", flush=True)
    failed = [name for name, result in results.items() if result["result"] != "passed"]
    print(f"{len(results) - len(failed)} of {len(results)} passed, {time.monotonic() - began:.0f} s")
    write_report(options, results)
    return 1 if failed else 0


def write_report(options: FaultOptions, results: dict[str, dict[str, Any]]) -> None:
    """Faults that were not examined this time keep the results that they have."""
    known = json.loads(options.json.read_bytes())["faults"] if options.json.is_file() else {}
    names = f" --only {' '.join(options.only)}" if options.only else ""
    report = {
        "command": f"python -m faults{names}",  # the last one
        "data": options.data_path.name if options.data_path else "as found",
        "machine": environment(),
        "faults": {name: (known | results)[name] for name in FAULTS if name in known | results},
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def examine(fault: Callable[[Lab], dict[str, Any]], lab: Lab) -> dict[str, Any]:
    began = time.monotonic()
    try:
        result = {"result": "passed"} | fault(lab)
    except AssertionError as error:
        result = {"result": "FAILED", "why": str(error)}
    return result | {"seconds": round(time.monotonic() - began)}


def write_texts(source: Path | None, target: Path) -> Path:
    """A few real texts where there are some, else sentences of few words."""
    usual = DATASET_DIR / "pretrain_hq.jsonl"
    source = source or (usual if usual.is_file() else None)
    found = (record.text for _, record in read_records(source, "pretrain")) if source else made_up()
    lines = [json.dumps({"text": text[:300]}, ensure_ascii=False) for text in islice(found, TEXTS)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def made_up() -> Iterator[str]:
    rng = random.Random(0)
    words = "春天 夏天 秋天 冬天 太阳 月亮 山 水 来了 走了 很好 one two".split()
    while True:
        yield "".join(rng.choices(words, k=rng.randint(5, 40)))


if __name__ == "__main__":
    run_cli(main)
