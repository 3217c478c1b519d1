"""Speed and memory of every stage on the real data files, through the commands that a person types.

    python -m benchmarks.stage_speed --data_dir dataset

Each stage trains a few dozen steps from the weights that the one before has just written, in a process of its
own. The teacher of the distillation has random weights: it computes as long as a trained one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import write_results
from minimind.config import PRESETS
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT

# The script and the data file of each stage, in their order.
STAGES = {
    "pretrain": ("train_pretrain.py", "pretrain_hq"),
    "full_sft": ("train_full_sft.py", "sft_mini_512"),
    "lora": ("train_lora.py", "lora_medical"),
    "rlhf": ("train_dpo.py", "dpo"),
    "reason": ("train_distill_reason.py", "r1_mix_1024"),
    "full_dist": ("train_distillation.py", "sft_mini_512"),
}
ROWS = {"pretrain": (8, 512), "full_sft": (4, 1024), "lora": (8, 512), "rlhf": (2, 2048), "reason": (4, 1024)}
ROWS["full_dist"] = ROWS["full_sft"]  # all have 4,096 tokens in a step
NOT_COUNTED = 2  # steps at the start of each run


@dataclass(frozen=True)
class BenchmarkOptions:
    data_dir: Path = flag(DATASET_DIR, "folder of the data files, plain or .gz")
    preset: str = flag("small", "model size", choices=[*PRESETS])
    teacher: str = flag("base", "size of the distillation's teacher", choices=[*PRESETS])
    steps: int = flag(24, "optimizer steps of each stage")
    compile: str = flag("auto", "torch.compile", choices=("auto", "0", "1"))
    json: Path = flag(ROOT / "benchmarks/results/stage_speed.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder)
        write_teacher(out_dir, options.teacher)
        for stage in STAGES:
            results[stage] = measure(stage, options, out_dir)
            shown = results[stage]
            print(f"{stage}: {shown['tokens_per_s']:,.0f} tokens/s, {shown['peak_gb']:.2f} GB", flush=True)
    report(options, results)
    return 0


def measure(stage: str, options: BenchmarkOptions, out_dir: Path) -> dict[str, Any]:
    """Run one stage; returns its command, median speed and peak memory."""
    script, data = STAGES[stage]
    batch_size, max_seq_len = ROWS[stage]
    flags = [
        f"--preset={options.preset}",
        f"--batch_size={batch_size}",
        f"--max_seq_len={max_seq_len}",
        "--accumulation_steps=1",
        f"--max_steps={options.steps}",
        f"--epochs={options.steps}",  # of a small file, as many as it takes
        f"--compile={options.compile}",
    ]
    if stage == "full_dist":
        flags.append(f"--teacher_preset={options.teacher}")
    files = [f"--data_path={find_data(options.data_dir, data)}", f"--out_dir={out_dir}", "--device=cpu"]
    command = [sys.executable, str(ROOT / "trainer" / script), *flags, *files]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{output}")

    log = next(out_dir.glob(f"**/runs/{'lora_medical' if stage == 'lora' else stage}_*/metrics.jsonl"))
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line][NOT_COUNTED:]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "command": f"python trainer/{script} {' '.join(flags)}",
        "data": data,
        "tokens_per_s": statistics.median(rates),
        "peak_gb": usage.ru_maxrss / 1024**2,
        "loss": [losses[0], losses[-1]],
    }


def find_data(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {name}.jsonl; name the folder of the data files with --data_dir")


def write_teacher(out_dir: Path, preset: str) -> None:
    from minimind.model import MiniMind
    from minimind.weights import save_weights

    save_weights(MiniMind(PRESETS[preset]), out_dir / f"full_sft_{PRESETS[preset].name}.pth")


def report(options: BenchmarkOptions, results: dict[str, dict[str, Any]]) -> None:
    """Print the results and write them beside the machine they were measured on."""
    table = Table("stage", "data", "tokens/s", "peak memory", "loss, first and last step")
    for stage, result in results.items():
        losses = " → ".join(f"{loss:.3f}" for loss in result["loss"])
        speed, memory = f"{result['tokens_per_s']:,.0f}", f"{result['peak_gb']:.2f} GB"
        table.add_row(stage, result["data"], speed, memory, losses)
    Console().print(table)
    write_results(options.json, options, {"teacher": options.teacher, "stages": results})


if __name__ == "__main__":
    run_cli(main)
