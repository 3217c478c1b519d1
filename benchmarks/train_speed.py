"""Training speed against the original's recipe, side by side in one process.

    python -m benchmarks.train_speed --data_path dataset/pretrain_hq.jsonl

The recipe: transformers' Llama in fp32, each record cut or padded to `max_seq_len`, AdamW. Ours: what
`train_pretrain.py` runs. Both train the same model on the same file with the same tokenizer, each in a
process of its own, in turn, so that a noisy machine disturbs both alike. A useful token is one that is not
padding.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import in_own_process, median_and_spread, rates_in_turn, write_results
from minimind.config import PRESETS
from minimind.data.records import read_records
from minimind.errors import run_cli
from minimind.flags import flag, parse_flags
from minimind.model import MiniMind
from minimind.paths import DATASET_DIR, ROOT
from minimind.stages.pretrain import PretrainOptions
from minimind.tokenizer import Tokenizer
from minimind.train.loop import Stage, StopSignals, Trainer
from minimind.train.monitor import matmul_rate
from minimind.train.parallel import setup


@dataclass(frozen=True)
class BenchmarkOptions:
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file to train on")
    preset: str = flag("small", "model size", choices=("tiny", "small", "base"))
    max_seq_len: int = flag(512, "length of a row in tokens")
    batch_size: int = flag(16, "rows in a pass")
    accumulation_steps: int = flag(4, "passes in an optimizer step")
    rounds: int = flag(5, "optimizer steps of each, after one that is not counted")
    compile: str = flag("auto", "torch.compile in ours", choices=("auto", "0", "1"))
    json: Path = flag(ROOT / "benchmarks/results/train_speed.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "original's recipe": in_own_process(padded_fp32, options),
            "minimind": in_own_process(minimind, options, Path(folder)),
        }
        rates = rates_in_turn(steps, options.rounds)
    report(options, rates, matmul_rate(torch.device("cpu"), torch.bfloat16))
    return 0


def padded_fp32(options: BenchmarkOptions) -> Callable[[], int]:
    """One optimizer step of the original's recipe; returns its useful tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from minimind.export.huggingface import transformers_config

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**transformers_config(PRESETS[options.preset]))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    tokenizer = Tokenizer.load()
    texts = (record.text for _, record in read_records(options.data_path, "pretrain"))

    def step() -> int:
        useful = 0
        for _ in range(options.accumulation_steps):
            ids = torch.zeros(options.batch_size, options.max_seq_len, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row in range(options.batch_size):
                tokens = tokenizer.encode_document(next(texts))[: options.max_seq_len]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss / options.accumulation_steps
            loss.backward()
            useful += int(mask.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return useful

    return step


def minimind(options: BenchmarkOptions, folder: Path) -> Callable[[], int]:
    """One optimizer step of this project's loop, reading its rows included; returns its useful tokens."""
    train_options = PretrainOptions(
        data_path=options.data_path,
        out_dir=folder,
        preset=options.preset,
        max_seq_len=options.max_seq_len,
        batch_size=options.batch_size,
        accumulation_steps=options.accumulation_steps,
        compile=options.compile,
        device="cpu",
    )
    trainer = Trainer(Stage("pretrain", data_kind="pretrain"), train_options, setup("cpu", "auto"))
    trainer.peak_rate = 1.0
    batches, numbers = trainer.step_batches(0), count()

    def step() -> int:
        return int(trainer.optimizer_step(next(numbers), next(batches), StopSignals())["tokens"])

    return step


def report(options: BenchmarkOptions, rates: dict[str, list[float]], peak: float) -> None:
    """Print the medians and write them beside the machine they were measured on."""
    with torch.device("meta"):
        flops_per_token = 6 * MiniMind(PRESETS[options.preset]).num_parameters
    medians = {name: statistics.median(values) for name, values in rates.items()}
    baseline = medians["original's recipe"]
    table = Table("", "useful tokens/s", "times the recipe", "of the bf16 matmul rate")
    for name, median in medians.items():
        share = flops_per_token * median / peak
        table.add_row(name, median_and_spread(rates[name]), f"{median / baseline:.2f}", f"{share:.0%}")
    Console().print(table)
    results = {
        "matmul_bf16_flops": peak,
        "tokens_per_s": rates,
        "data": options.data_path.name,
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
    }
    command = f"python -m benchmarks.train_speed --preset {options.preset} --rounds {options.rounds}"
    write_results(options.json, command, results)


if __name__ == "__main__":
    run_cli(main)
