"""`make demo`: from public text to a talking model on a laptop CPU, then measured on what it never saw.

Writes its data to dataset/demo, its weights and a report to out/demo.

    minimind demo                   pretraining and fine-tuning, some ten minutes on two cores
    minimind demo --stages all      LoRA, DPO, reasoning and distillation too
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from minimind.demo.data import write_demo_data
from minimind.demo.measure import measure, metrics_table
from minimind.demo.run import answerer, run_script
from minimind.demo.stages import other_stages
from minimind.environment import environment
from minimind.errors import run_cli
from minimind.evaluate.report import write_report
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, OUT_DIR, ROOT

T = TypeVar("T")

TRAINING = "--preset=tiny --max_seq_len=256 --batch_size=16 --accumulation_steps=1 --log_interval=25".split()
PRETRAIN = "--epochs=1 --learning_rate=0.005".split()
SFT = "--epochs=5 --learning_rate=0.003".split()
CONVERSATION = (
    "你好",
    "你是谁？",
    "37加48等于多少？",
    "计算92减57",
    "What can you do?",
)


STAGES = ("base", "all")


@dataclass(frozen=True)
class DemoOptions:
    stages: str = flag("base", "base: pretraining and fine-tuning; all: the other four too", choices=STAGES)
    data_dir: Path = flag(DATASET_DIR / "demo", "folder the data is written to")
    out_dir: Path = flag(OUT_DIR / "demo", "folder of the weights and the report")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DemoOptions, argv, __doc__)
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        console.rule(f"{len(seconds) + 1}/{8 if options.stages == 'all' else 4} {name}")
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    data = timed("data", lambda: write_demo_data(options.data_dir))
    console.print("records: " + ", ".join(f"{name} {count:,}" for name, count in data.records.items()))
    out = [f"--out_dir={options.out_dir}", *TRAINING]
    timed(
        "pretraining",
        lambda: run_script(
            console,
            "train_pretrain.py",
            [f"--data_path={data.pretrain}", f"--eval_path={data.pretrain_val}", *out, *PRETRAIN],
        ),
    )
    timed(
        "fine-tuning",
        lambda: run_script(console, "train_full_sft.py", [f"--data_path={data.sft}", *out, *SFT]),
    )

    answer = answerer(options.out_dir / "full_sft_256.pth")
    metrics = timed("measuring", lambda: measure(answer, data))
    asked = [*CONVERSATION, *(question.question for question in data.idioms[:2])]
    samples = list(zip(asked, answer(asked), strict=True))
    runs = [
        (name, options.out_dir / "runs" / f"{stem}_256" / "metrics.jsonl")
        for name, stem in (("Pretraining", "pretrain"), ("Fine-tuning", "full_sft"))
    ]
    if options.stages == "all":
        more = other_stages(console, data, options.out_dir, timed)
        metrics, samples, runs = metrics + more.metrics, samples + more.samples, runs + more.runs
    for question, reply in samples:
        console.print(f"[bold]👤 {question}[/]")
        console.print(f"🤖 {reply}\n", markup=False)
    console.print(metrics_table(metrics))

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest process; they follow each other
    peak = max(resource.getrusage(w).ru_maxrss for w in who) / 1024**2
    cost = {name: f"{value:.0f} s" for name, value in seconds.items()}
    cost |= {"all": f"{(time.perf_counter() - began) / 60:.1f} min", "peak memory": f"{peak:.2f} GB"}
    console.print("took: " + ", ".join(f"{name} {value}" for name, value in cost.items()))
    report = options.out_dir / "report.html"
    write_report(
        report,
        title="MiniMind demo",
        runs=runs,
        metrics=metrics,
        samples=samples,
        tables={"用量 · What it took": cost, "环境 · Environment": environment()},
    )
    console.print(f"report: {report}  (open it in a browser)\n\nnext:")
    shown = options.out_dir.relative_to(ROOT) if options.out_dir.is_relative_to(ROOT) else options.out_dir
    console.print(f"  .venv/bin/python eval_model.py --model_mode 1 --out_dir {shown}   # talk to it")
    console.print("  .venv/bin/python trainer/train_pretrain.py --help            # train on your own text")
    return 0


if __name__ == "__main__":
    run_cli(main)
