"""How long a person waits: for any `--help`, and for the first step of a training.

    python -m benchmarks.startup

Each time is that of a fresh process, from its start on; medians are given. The first step is of a small
batch, with the tokens of the data file already in the cache, as in every run but a file's first. Where its
time goes is measured from inside, in processes of their own (`benchmarks/startup_parts.py`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import write_results
from minimind.cli import COMMANDS
from minimind.config import PRESETS
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT

HELP_GOAL, FIRST_STEP_GOAL = 1.0, 8.0  # seconds


@dataclass(frozen=True)
class BenchmarkOptions:
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file to train on")
    preset: str = flag("small", "model size", choices=[*PRESETS])
    max_seq_len: int = flag(512, "length of a row in tokens")
    batch_size: int = flag(8, "rows in the first step, all in one pass")
    rounds: int = flag(3, "processes of each, of which the median is taken")
    json: Path = flag(ROOT / "benchmarks/results/startup.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    helps = {shown(command): help_seconds(command, options.rounds) for command in commands()}
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(options, Path(folder))
        first_step_seconds(flags)  # fills the cache, and is not counted
        first_steps = [first_step_seconds(flags) for _ in range(options.rounds)]
        parts = [parts_of_a_start(flags) for _ in range(options.rounds)]
    medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    report(options, helps, first_steps, medians)
    return 0


def commands() -> list[list[str]]:
    """All that this project lets a person type, without the interpreter's name."""
    scripts = [ROOT / "eval_model.py", *sorted((ROOT / "trainer").glob("*.py"))]
    return [
        *([str(script.relative_to(ROOT))] for script in scripts),
        *(["-m", "minimind", *name.split()] for name in ("", *COMMANDS)),
    ]


def shown(command: list[str]) -> str:
    return " ".join(["python", *command])


def help_seconds(command: list[str], rounds: int) -> float:
    """Median seconds until `--help` has answered."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def training_flags(options: BenchmarkOptions, out_dir: Path) -> list[str]:
    rows = [f"--max_seq_len={options.max_seq_len}", f"--batch_size={options.batch_size}"]
    size = [f"--preset={options.preset}", *rows, "--accumulation_steps=1", "--max_steps=1"]
    return [*size, f"--data_path={options.data_path.absolute()}", f"--out_dir={out_dir}"]


def first_step_seconds(flags: list[str]) -> float:
    """From the start of the command that a person types until it says that its first step is done."""
    command = [sys.executable, "trainer/train_pretrain.py", *flags]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                child.kill()  # evaluating and saving come after the first step
                return seconds
    raise UserError(f"{shown(command[1:])} ended without a step; what it said stands above")


def parts_of_a_start(flags: list[str]) -> dict[str, float]:
    """Seconds of each part of a start, in their order; their sum is the whole."""
    command = [sys.executable, "-m", "benchmarks.startup_parts", *flags]
    began = time.perf_counter()
    child = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    parts = json.loads(child.stdout.splitlines()[-1])
    return parts | {"interpreter and the rest": seconds - sum(parts.values())}


def report(
    options: BenchmarkOptions, helps: dict[str, float], first_steps: list[float], parts: dict[str, float]
) -> None:
    """Print the times beside their goals, and write them beside the machine they were measured on."""
    first_step = statistics.median(first_steps)
    table = Table("", "seconds", "goal")
    for name, seconds in helps.items():
        table.add_row(f"{name} --help", f"{seconds:.2f}", verdict(seconds, HELP_GOAL))
    table.add_section()
    table.add_row("first step of a training", f"{first_step:.2f}", verdict(first_step, FIRST_STEP_GOAL))
    for name, seconds in parts.items():
        table.add_row(f"    {name}", f"{seconds:.2f}", "")
    Console().print(table)
    results = {
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "data": options.data_path.name,
        "help_s": helps,
        "first_step_s": first_steps,
        "first_step_parts_s": parts,
        "goals_s": {"help": HELP_GOAL, "first_step": FIRST_STEP_GOAL},
    }
    write_results(options.json, options, results)


def verdict(seconds: float, goal: float) -> str:
    return f"{'✓' if seconds < goal else '✗'} < {goal:g}"


if __name__ == "__main__":
    run_cli(main)
