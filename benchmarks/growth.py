"""How time and memory grow with the length of a row, the model, the data file, and the processes.

    python -m benchmarks.growth

Every training is the command that a person types, in a process of its own and without torch.compile, whose
minutes would hide what is measured; steps have the same number of tokens, and a pass the same number of rows
for all models. Time is the median step after the first ones. Memory is what a process held at the worst
moment; Python, PyTorch and the copy that a checkpoint is written from are in it. An exponent p means "grows
like x to the power of p"; it is fitted to all points by least squares on logarithms, and, since fixed costs
hide growth at small x, given for the last two alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generated_files import measure_generated
from benchmarks.pictures import draw_growth
from benchmarks.side_by_side import write_results
from minimind.data.records import read_records
from minimind.environment import available_cores
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT

NOT_COUNTED = 2  # steps at the start of each run


@dataclass(frozen=True)
class BenchmarkOptions:
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file of texts to train on")
    steps: int = flag(6, "optimizer steps of each run; the first two are not counted")
    dry_run: bool = flag(False, "the smallest model and few points, to see that everything works")
    json: Path = flag(ROOT / "benchmarks/results/growth.json", "where the results are written")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    preset: str
    step_tokens: int
    lengths: tuple[int, ...]
    models: tuple[str, ...]  # presets without experts, of which a token would meet only some
    not_fitted: tuple[str, ...]  # further presets
    max_seq_len: int  # of the models and processes
    pass_rows: int  # of the models and processes; as many as a pass of the largest model has
    files_mb: tuple[float, ...]
    training_records: int


FULL = Plan(
    preset="small",
    step_tokens=4096,
    lengths=(128, 256, 512, 1024, 2048, 4096),
    models=("tiny", "small", "base"),
    not_fitted=("moe",),
    max_seq_len=512,
    pass_rows=2,
    files_mb=(8, 16, 32, 64, 128),
    training_records=4000,
)
DRY = Plan(
    preset="tiny",
    step_tokens=128,
    lengths=(64, 128),
    models=("tiny --num_hidden_layers=1", "tiny"),
    not_fitted=(),
    max_seq_len=64,
    pass_rows=2,
    files_mb=(0.05, 0.1),
    training_records=100,
)


@dataclass(frozen=True)
class Point:
    """One measurement."""

    name: str
    x: float
    seconds: float  # of what the axis says
    peak_mb: float
    fitted: bool = True


@dataclass(frozen=True)
class Axis:
    title: str
    x_label: str
    seconds_label: str
    points: list[Point]

    def exponents(self, value: str) -> dict[str, float]:
        """Of `seconds` or `peak_mb`: over all points, and over the last two."""
        points = [point for point in self.points if point.fitted]
        x, y = [point.x for point in points], [getattr(point, value) for point in points]
        return {"all": exponent(x, y), "last_two": exponent(x[-2:], y[-2:])}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of y = a · x^p that fits best, by least squares on the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    if options.steps <= NOT_COUNTED:
        raise UserError(f"--steps is {options.steps}; it must be more than {NOT_COUNTED}")
    plan = DRY if options.dry_run else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(options.data_path, folder, plan.training_records)

        @cache  # two axes may share a run
        def run(model: str, max_seq_len: int, pass_rows: int, processes: int) -> dict[str, Any]:
            passes = plan.step_tokens // (max_seq_len * pass_rows)
            rows = [f"--max_seq_len={max_seq_len}", f"--batch_size={pass_rows}"]
            steps = [f"--accumulation_steps={passes}", f"--max_steps={options.steps}"]
            return train([*f"--preset={model}".split(), *rows, *steps], processes, folder)

        axes = [
            of_row_lengths(plan, run),
            of_models(plan, run),
            of_files(options.data_path, plan, folder),
            of_processes(plan, run),
        ]
    report(options, plan, axes)
    return 0


def write_data(source: Path, folder: Path, records: int) -> None:
    """A file to train on, and one of a few records, so that evaluating takes no time."""
    texts = [record.text for _, record in islice(read_records(source, "pretrain"), records)]
    for name, some in (("training", texts), ("held_out", texts[:4])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


# Four axes

Run = Callable[..., dict[str, Any]]


def of_row_lengths(plan: Plan, run: Run) -> Axis:
    points = []
    for length in plan.lengths:
        result = run(plan.preset, length, plan.step_tokens // length, 1)
        points.append(said(Point(f"{length} tokens", length, result["seconds_per_token"], result["peak_mb"])))
    return Axis("Length of a row", "tokens in a row", "seconds per token", points)


def of_models(plan: Plan, run: Run) -> Axis:
    points = []
    for model in (*plan.models, *plan.not_fitted):
        result = run(model, plan.max_seq_len, plan.pass_rows, 1)
        time, memory = result["seconds_per_token"], result["peak_mb"]
        fitted = model in plan.models
        points.append(said(Point(model, result["parameters"] / 1e6, time, memory, fitted)))
    return Axis("Size of the model", "millions of parameters", "seconds per token", points)


def of_files(source: Path, plan: Plan, folder: Path) -> Axis:
    points = []
    for megabytes in plan.files_mb:
        result = measure_generated(source, megabytes / 1000, plan.max_seq_len, folder)
        seconds = result["prepare_s"] + result["pack_s"]
        points.append(said(Point(f"{megabytes:g} MB", result["file_mb"], seconds, result["peak_memory_mb"])))
    return Axis("Size of the data file", "MB", "seconds to prepare", points)


def of_processes(plan: Plan, run: Run) -> Axis:
    points = []
    for processes in (1, 2):
        result = run(plan.preset, plan.max_seq_len, plan.pass_rows, processes)
        step = result["seconds_per_step"]
        points.append(
            said(Point(f"{processes} process{'es' * (processes > 1)}", processes, step, result["peak_mb"]))
        )
    return Axis("Number of processes that share the cores", "processes", "seconds per step", points)


def said(point: Point) -> Point:
    print(f"{point.name}: {point.seconds:.4g} s, {point.peak_mb:,.0f} MB", flush=True)
    return point


def train(flags: list[str], processes: int, folder: Path) -> dict[str, Any]:
    """Run a pretraining; what its median step took, and what its main process held at most."""
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        data = [f"--data_path={folder / 'training.jsonl'}", f"--eval_path={folder / 'held_out.jsonl'}"]
        more = ["--compile=0", "--device=cpu", f"--out_dir={out_dir}"]
        command = [*launcher(processes), str(ROOT / "trainer/train_pretrain.py"), *flags, *data, *more]
        threads = {"OMP_NUM_THREADS": str(max(1, threads_in_all() // processes))}
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if ended.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{ended.stdout}{ended.stderr}")
        log = next(Path(out_dir).glob("runs/*/metrics.jsonl"))
        settings = json.loads(log.with_name("run.json").read_bytes())
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line][NOT_COUNTED:]
    return {
        "parameters": settings["parameters"],
        "seconds_per_token": statistics.median(1 / step["tokens_per_s"] for step in steps),
        "seconds_per_step": statistics.median(step["tokens"] / step["tokens_per_s"] for step in steps),
        "peak_mb": settings["cost"]["peak_memory"] / 1e6,
    }


def threads_in_all() -> int:
    """Those the user allows, else one for every core; several processes share them out."""
    return int(os.environ.get("OMP_NUM_THREADS") or available_cores())


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def report(options: BenchmarkOptions, plan: Plan, axes: list[Axis]) -> None:
    """Print the exponents, draw the points, and write both beside the machine they were measured on."""
    table = Table(
        "grows with",
        "from … to",
        "time",
        "memory",
        title="Exponents of growth: over all points (over the last two)",
    )
    for axis in axes:
        shown = (
            "{all:.2f} ({last_two:.2f})".format(**axis.exponents(value)) for value in ("seconds", "peak_mb")
        )
        fitted = [point for point in axis.points if point.fitted]
        table.add_row(axis.title, f"{fitted[0].name} … {fitted[-1].name}", *shown)
    Console().print(table)
    results = {
        "compile": "0",
        "dry_run": options.dry_run,
        "steps": options.steps,
        "threads": threads_in_all(),
        "data": options.data_path.name,
        "plan": asdict(plan),
        "axes": [
            asdict(axis) | {"exponents": {value: axis.exponents(value) for value in ("seconds", "peak_mb")}}
            for axis in axes
        ],
    }
    draw_growth(options.json.with_suffix(".svg"), results)
    write_results(options.json, options, results)


if __name__ == "__main__":
    run_cli(main)
