"""`make demo`: from public text to a talking model on a laptop CPU, then measured on what it never saw."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from minimind.chat.options import SamplingOptions
from minimind.demo.data import DemoData, write_demo_data
from minimind.demo.measure import measure, metrics_table
from minimind.environment import environment
from minimind.errors import run_cli
from minimind.evaluate.report import write_report
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, OUT_DIR, ROOT

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


@dataclass(frozen=True)
class DemoOptions:
    data_dir: Path = flag(DATASET_DIR / "demo", "folder the data is written to")
    out_dir: Path = flag(OUT_DIR / "demo", "folder of the weights and the report")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DemoOptions, argv, __doc__)
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        console.rule(name)
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    data: DemoData = timed("1/4 data", lambda: write_demo_data(options.data_dir))
    console.print("records: " + ", ".join(f"{name} {count:,}" for name, count in data.records.items()))
    out = [f"--out_dir={options.out_dir}", *TRAINING]
    timed(
        "2/4 pretraining",
        lambda: stage(
            console,
            "train_pretrain.py",
            [f"--data_path={data.pretrain}", f"--eval_path={data.pretrain_val}", *out, *PRETRAIN],
        ),
    )
    timed(
        "3/4 fine-tuning",
        lambda: stage(console, "train_full_sft.py", [f"--data_path={data.sft}", *out, *SFT]),
    )

    answer = answerer(options.out_dir / "full_sft_256.pth")
    metrics = timed("4/4 measuring", lambda: measure(answer, data))
    asked = [*CONVERSATION, *(question.question for question in data.idioms[:2])]
    samples = list(zip(asked, answer(asked), strict=True))
    for question, reply in samples:
        console.print(f"[bold]👤 {question}[/]")
        console.print(f"🤖 {reply}\n", markup=False)
    console.print(metrics_table(metrics))

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # the largest process; they follow each other
    peak = max(resource.getrusage(w).ru_maxrss for w in who) / 1024**2
    cost = {f"{name.split(' ')[1]}": f"{value:.0f} s" for name, value in seconds.items()}
    cost |= {"all": f"{(time.perf_counter() - began) / 60:.1f} min", "peak memory": f"{peak:.2f} GB"}
    console.print("took: " + ", ".join(f"{name} {value}" for name, value in cost.items()))
    report = options.out_dir / "report.html"
    write_report(
        report,
        title="MiniMind demo",
        runs=[
            (name, options.out_dir / "runs" / f"{stem}_256" / "metrics.jsonl")
            for name, stem in (("Pretraining", "pretrain"), ("Fine-tuning", "full_sft"))
        ],
        metrics=metrics,
        samples=samples,
        environment=environment(),
        cost=cost,
    )
    console.print(f"report: {report}  (open it in a browser)\n\nnext:")
    shown = options.out_dir.relative_to(ROOT) if options.out_dir.is_relative_to(ROOT) else options.out_dir
    console.print(f"  .venv/bin/python eval_model.py --model_mode 1 --out_dir {shown}   # talk to it")
    console.print("  .venv/bin/python trainer/train_pretrain.py --help            # train on your own text")
    return 0


def stage(console: Console, script: str, argv: list[str]) -> None:
    """Run a training script, showing the command: what the demo does is what a person would type."""
    console.print(f"[dim]$ python trainer/{script} {' '.join(argv)}[/]")
    code = subprocess.run([sys.executable, ROOT / "trainer" / script, *argv], check=False).returncode
    if code:
        raise SystemExit(code)


def answerer(weights: Path) -> Callable[[list[str]], list[str]]:
    """A function that answers a batch of questions greedily with the model in `weights`."""
    from minimind.chat.generate import generate_batch
    from minimind.tokenizer import Tokenizer
    from minimind.weights import load_model

    tokenizer = Tokenizer.load()
    model = load_model(weights, "make demo").eval()
    sampling = replace(SamplingOptions(), temperature=0.0, max_new_tokens=120)

    def answer(questions: list[str]) -> list[str]:
        prompts = [
            tokenizer.encode_chat([{"role": "user", "content": q}], add_generation_prompt=True)[0]
            for q in questions
        ]
        return [tokenizer.decode(ids) for ids in generate_batch(model, prompts, sampling)]

    return answer


if __name__ == "__main__":
    run_cli(main)
