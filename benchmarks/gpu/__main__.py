"""Everything about one GPU in under nine minutes: is it right, how fast is it, what does an epoch take?

    python -m benchmarks.gpu                                  on a machine with a CUDA card
    python -m benchmarks.gpu --device cpu --dry_run 1         the same code with tiny models, anywhere

Results are checked against the CPU's, while all that will be measured is compiled, several at once. Then
every preset pretrains and every other stage trains `small`, with default flags, each in a process of its own
and one at a time: one that fails is a row with its error. `wide` is the dense model of as much work as `moe`.
The MFU leaves attention out, and is given against the measured rate of bf16 products and against the card's
data sheet.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.data import RECORDS, write_data
from benchmarks.gpu.jobs import OwnProcess, caught
from benchmarks.gpu.report import card_of, show, with_shares
from benchmarks.side_by_side import write_results
from minimind.environment import environment
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT

BOX = 240  # seconds to get ready, of which compiling takes the most, and as many for the rest
ROOM = 10e9  # bytes
STRETCH_SECONDS, STRETCH_STEPS = 30, 1000  # of a real run: so many steps, fewer if they would take longer


@dataclass(frozen=True)
class BenchmarkOptions:
    data_dir: Path = flag(
        DATASET_DIR, "folder of the data files, plain or .gz; text is made for missing ones"
    )
    device: str = flag("cuda", "cuda, cuda:1 or cpu")
    minutes: float = flag(8.5, "what has not begun by then is left out")
    seconds: float = flag(5.0, "measured steps of each job")
    dry_run: bool = flag(False, "tiny models, a moment each: shows that the benchmark works, and no speed")
    json: Path = flag(ROOT / "benchmarks/results/gpu.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA card here; --device cpu --dry_run 1 tries out the benchmark")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="minimind_gpu_data_") as folder:
        origins = write_data(Path(folder), options.data_dir, 400 if options.dry_run else RECORDS)
        results = measure_all(options, Path(folder), began + 60 * options.minutes)
    card = card_of(options.device)
    results = {
        "card": card,
        "machine": environment() | versions(),
        "data": origins,
        "dry_run": options.dry_run,
        "seconds": time.perf_counter() - began,
        **with_shares(results, card),
    }
    write_results(options.json, options, results)
    show(results)
    return 0 if not failures(results) else 1


def failures(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in (*results["speed"], results["stretch"]) if "error" in row]
    rows += [results["matmul_bf16"]] if isinstance(results["matmul_bf16"], dict) else []
    return rows + [check for check in results["checks"] if not check["passed"]]


def measure_all(options: BenchmarkOptions, data: Path, end: float) -> dict[str, Any]:
    from benchmarks.gpu.checks import all_checks, peak_rate
    from benchmarks.gpu.speed import Job, Setting, measure, stretch

    setting = Setting(options.device, data, options.seconds, options.dry_run)
    jobs = [Job("pretrain", preset) for preset in ("small", "base", "moe", "wide")]
    jobs += [Job(stage, "small") for stage in ("sft", "dpo", "lora", "reason", "distill")]
    jobs += [Job("pretrain", "tiny")]
    calls = [(all_checks, setting), (peak_rate, setting), *((measure, job, setting) for job in jobs)]
    checks, rate, *speed = in_turn(calls, options, end)
    speed = [vars(job) | row for job, row in zip(jobs, speed, strict=True)]
    (run,) = in_turn([(stretch, stretch_steps(speed[0], options.dry_run), setting)], options, end)
    if isinstance(checks, dict):
        checks = [{"model": "all", "check": "all", "value": None, "limit": None, "passed": False, **checks}]
    return {"matmul_bf16": rate, "checks": checks, "speed": speed, "stretch": run}


def in_turn(calls: list[tuple], options: BenchmarkOptions, end: float) -> list[Any]:
    """What each call returns. As many as fit beside each other get ready together, and go on in turn."""
    if options.dry_run:  # a process for each would take longer than all else
        return [caught(*call) for call in calls]
    results: list[Any] = []
    at_once = calls_at_once(options.device)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    for start in range(0, len(calls), at_once):
        processes = [
            OwnProcess(*call) for call in calls[start : start + at_once] if time.perf_counter() < end
        ]
        try:
            for process in processes:
                process.ready(min(BOX, end - time.perf_counter()))
            for process, (function, *arguments) in zip(processes, calls[start:], strict=False):
                left = end - time.perf_counter()
                print(
                    f"{60 * options.minutes - left:4.0f} s:", function.__name__, *arguments[:-1], flush=True
                )
                results.append(process.result(min(BOX, left)))
        finally:  # Python would wait at its end for those that wait for their turn
            for process in processes:
                process.end()
    return results + [{"error": "no time was left"}] * (len(calls) - len(results))


def calls_at_once(device: str) -> int:
    """As many as have a core and room on the GPU for their weights while they wait for each other."""
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(os.cpu_count() or 1, int(memory / ROOM)))


def stretch_steps(small: dict[str, Any], dry_run: bool) -> int:
    if dry_run:
        return 5
    return max(20, min(STRETCH_STEPS, int(STRETCH_SECONDS / small.get("step_s", 1.0))))


def versions() -> dict[str, str | None]:
    """Of what decides a GPU's speed beside PyTorch."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    found: dict[str, str | None] = {"CUDA": torch.version.cuda}
    if torch.cuda.is_available():
        driver = caught(subprocess.check_output, query)
        found["driver, power limit"] = None if isinstance(driver, dict) else driver.decode().strip()
    return found


if __name__ == "__main__":
    run_cli(main)
