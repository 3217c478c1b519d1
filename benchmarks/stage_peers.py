"""Stages beside TRL's trainers, on the same weights, records and row length; LoRA beside full fine-tuning.

    python -m benchmarks.stage_peers --data_dir dataset

sft    what `train_full_sft.py` runs, beside `trl.SFTTrainer` as it comes and with its packing; 512 tokens
dpo    what `train_dpo.py` runs, beside `trl.DPOTrainer` as it comes (the reference model is asked in every
       step) and with its references worked out before; 1,024 tokens for each answer, so 2,048 for our rows,
       which hold both answers of a pair
lora   what `train_lora.py` runs, beside full fine-tuning of the same model on the same rows, both ours

TRL runs its own `train()` in bf16 where the processor has it, without gradient checkpointing. Each rival has
a process of its own, and they take turns, so that a noisy machine disturbs all alike. A useful token is a
position that is not padding and has a next token of its record. Working the references out once is counted
in the rates: its time is shared out over the tokens of the two epochs that `train_dpo.py` makes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.comparisons import median_and_spread, stages
from benchmarks.own_steps import EPOCHS, OwnSteps
from benchmarks.side_by_side import (
    Work,
    in_own_process,
    note,
    notes,
    rates_in_turn,
    write_results,
)
from benchmarks.stage_speed import find_data
from minimind.config import PRESETS
from minimind.environment import peak_memory
from minimind.errors import run_cli
from minimind.export.huggingface import transformers_config, transformers_state_dict
from minimind.flags import flag, parse_flags
from minimind.model import MiniMind
from minimind.paths import DATASET_DIR, ROOT, TOKENIZER_DIR
from minimind.stages import dpo, lora, sft
from minimind.weights import save_weights

STAGES = {"sft": ("sft_mini_512", 512), "dpo": ("dpo", 1024), "lora": ("lora_medical", 512)}
MODULES = {"sft": sft, "dpo": dpo, "lora": lora, "full": sft}
OPTIONS = {"sft": sft.SFTOptions, "dpo": dpo.DPOOptions, "lora": lora.LoRAOptions, "full": sft.SFTOptions}
DPO_EPOCHS = dpo.DPOOptions.epochs
NOTES = {  # the file in which a rival keeps its notes
    "minimind": "ours",
    "TRL": "trl",
    "TRL, packing": "packing",
    "TRL, references before": "precompute",
    "LoRA": "lora",
    "full fine-tuning": "full",
}


@dataclass(frozen=True)
class BenchmarkOptions:
    stages: tuple[str, ...] = flag((*STAGES,), "what to compare", choices=(*STAGES,))
    preset: str = flag("small", "model size", choices=("tiny", "small", "base"))
    data_dir: Path = flag(DATASET_DIR, "folder of the data files, plain or .gz")
    max_seq_len: int | None = flag(None, "tokens of a record at most; without it 512, for dpo 1024")
    rows: int = flag(8, "rows in a step; TRL's are records, for dpo pairs, and ours of dpo half as many")
    rounds: int = flag(5, "optimizer steps of each, after one that is not counted")
    compile: str = flag("auto", "torch.compile in minimind", choices=("auto", "0", "1"))
    json: Path = flag(ROOT / "benchmarks/results/stage_peers.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    paths = {stage: find_data(options.data_dir, STAGES[stage][0]) for stage in options.stages}
    results = {stage: measure(stage, path, options) for stage, path in paths.items()}
    report(results)
    write_results(options.json, options, {"preset": options.preset, "stages": results})
    return 0


def measure(stage: str, path: Path, options: BenchmarkOptions) -> dict[str, Any]:
    """All rivals of one stage in turn."""
    print(stage, flush=True)
    length = options.max_seq_len or STAGES[stage][1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(options.preset, folder)
        works = RIVALS[stage](path, length, options, folder)
        rates = rates_in_turn(works, options.rounds)
        found = {
            rival: result(values, notes(folder / f"{NOTES[rival]}.jsonl")) for rival, values in rates.items()
        }
    return {"data": path.name, "max_seq_len": length, "rivals": found}


def result(rates: list[float], written: list[dict[str, float]]) -> dict[str, Any]:
    """What one rival has reached, from its rates and its notes.

    What was done once is shared out: so many seconds for each token, beside the 1 / rate of its step.
    """
    steps = [line for line in written if "seconds" in line]
    data_tokens = next((line["data_tokens"] for line in written if "data_tokens" in line), 0)
    once = steps[0]["once_s"]
    shared = once / (DPO_EPOCHS * data_tokens) if once else 0.0
    return {
        "tokens_per_s": [rate / (1 + rate * shared) for rate in rates],
        "steps_alone_tokens_per_s": rates,
        "done_once_s": once,
        "step_s": statistics.median(step["seconds"] for step in steps[1:]),
        "step_tokens": [int(step["tokens"]) for step in steps],
        "peak_gb": steps[-1]["peak_bytes"] / 1e9,
    }


def write_model(preset: str, folder: Path) -> None:
    """Random weights, which take as long as trained ones, as our stages look for them and as TRL does."""
    torch.manual_seed(0)
    model = MiniMind(PRESETS[preset])
    for stage in ("pretrain", "full_sft"):
        save_weights(model, folder / f"{stage}_{model.config.name}.pth")
    exported = folder / "transformers"
    shutil.copytree(TOKENIZER_DIR, exported)
    config = transformers_config(model.config) | {"architectures": ["LlamaForCausalLM"]}
    (exported / "config.json").write_text(json.dumps(config))
    state = transformers_state_dict(model.state_dict(), model.config)
    save_file(state, exported / "model.safetensors", metadata={"format": "pt"})


def sft_rivals(path: Path, length: int, options: BenchmarkOptions, folder: Path) -> dict[str, Work]:
    trl = (folder / "transformers", path, length, options.rows)
    return {
        "minimind": in_own_process(ours, "sft", path, length, options.rows, options, folder, "ours"),
        "TRL": in_own_process(trl_sft, *trl, False, folder),
        "TRL, packing": in_own_process(trl_sft, *trl, True, folder),
    }


def dpo_rivals(path: Path, length: int, options: BenchmarkOptions, folder: Path) -> dict[str, Work]:
    rows = max(1, options.rows // 2)  # more than one pair fits into a row
    trl = (folder / "transformers", path, length, options.rows)
    return {
        "minimind": in_own_process(ours, "dpo", path, 2 * length, rows, options, folder, "ours"),
        "TRL": in_own_process(trl_dpo, *trl, False, folder),
        "TRL, references before": in_own_process(trl_dpo, *trl, True, folder),
    }


def trl_sft(*arguments: Any) -> Work:
    from benchmarks.peers.trl_steps import sft_steps  # only where it is needed: importing TRL takes seconds

    return sft_steps(*arguments)


def trl_dpo(*arguments: Any) -> Work:
    from benchmarks.peers.trl_steps import dpo_steps

    return dpo_steps(*arguments)


def lora_rivals(path: Path, length: int, options: BenchmarkOptions, folder: Path) -> dict[str, Work]:
    return {
        name: in_own_process(ours, stage, path, length, options.rows, options, folder, stage)
        for name, stage in (("LoRA", "lora"), ("full fine-tuning", "full"))
    }


Rivals = Callable[[Path, int, BenchmarkOptions, Path], dict[str, Work]]
RIVALS: dict[str, Rivals] = {"sft": sft_rivals, "dpo": dpo_rivals, "lora": lora_rivals}


def ours(
    stage: str, path: Path, length: int, rows: int, options: BenchmarkOptions, folder: Path, name: str
) -> Work:
    """One optimizer step of one of our stages; returns its useful tokens."""
    own = OPTIONS[stage](
        data_path=path,
        out_dir=folder,
        preset=options.preset,
        max_seq_len=length,
        batch_size=rows,
        accumulation_steps=1,
        epochs=EPOCHS,
        compile=options.compile,
        device="cpu",
    )
    steps = OwnSteps(MODULES[stage].stage(own), own)
    written, once = folder / f"{name}.jsonl", None

    def step() -> int:
        nonlocal once
        if once is None:  # not before its turn, to disturb nobody
            once = begin(steps)
            note(written, data_tokens=steps.trainer.data.num_tokens)
        tokens = steps.step()
        note(written, tokens=tokens, seconds=steps.took, once_s=once, peak_bytes=peak_memory())
        return tokens

    return step


def begin(steps: OwnSteps) -> float:
    """Have the objective do what it does once before training, as `Trainer.run` does; returns the seconds."""
    trainer, began = steps.trainer, time.perf_counter()
    if not trainer.objective.scores_first:
        return 0.0
    trainer.objective.begin(trainer.model, trainer.datasets(), trainer.parallel, trainer.shares.batch_size)
    return time.perf_counter() - began


def report(results: dict[str, dict[str, Any]]) -> None:
    table = Table("", "", "useful tokens/s", "times the peer", "a step", "peak memory")
    for stage, comparison in stages(results).items():
        for rival, shown in results[stage]["rivals"].items():
            table.add_row(
                stage,
                rival,
                median_and_spread(shown["tokens_per_s"]),
                f"{comparison.times(rival).median:.2f}",
                f"{shown['step_s']:.2f} s",
                f"{shown['peak_gb']:.2f} GB",
            )
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
