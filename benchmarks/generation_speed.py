"""Generation speed against transformers' `generate` on the same weights, side by side.

    python -m benchmarks.generation_speed --preset small

One answer alone, and 16 at once, greedy, from prompts of 32 tokens; tokens are counted from the submission to
the last token, reading the prompt included. The runs take turns, so that a noisy machine disturbs all alike,
and each turn measures how fast memory is read just then.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.comparisons import generation, median_and_spread
from benchmarks.side_by_side import write_results
from minimind.chat.generate import generate_batch
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.config import PRESETS, ModelConfig
from minimind.errors import run_cli
from minimind.export.huggingface import transformers_config, transformers_state_dict
from minimind.flags import flag, parse_flags
from minimind.model import MiniMind
from minimind.paths import ROOT

BYTES = {"half": 2, "int8": 1}  # of a weight
MANY = 16
Run = Callable[[], int]  # returns how many tokens it made


@dataclass(frozen=True)
class BenchmarkOptions:
    preset: str = flag("small", "model size", choices=tuple(PRESETS))
    prompt_tokens: int = flag(32, "length of each prompt")
    new_tokens: int = flag(128, "length of each answer")
    rounds: int = flag(5, "turns of each, after one that is not counted")
    json: Path = flag(ROOT / "benchmarks/results/generation_speed.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    torch.manual_seed(0)
    model = MiniMind(PRESETS[options.preset]).eval()
    for parameter in model.parameters():  # random weights take as long as trained ones
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    prompts = torch.randint(3, model.config.vocab_size, (MANY, options.prompt_tokens))
    runs = ours(model, prompts, options) | transformers_runs(model, prompts, options)

    speeds: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    block = torch.zeros(2**26)  # 256 MiB, more than any cache
    for number in range(options.rounds + 1):
        began = time.perf_counter()
        block.sum()
        rates.append(block.nbytes / (time.perf_counter() - began))
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = run()
            speeds[name].append(tokens / (time.perf_counter() - began))
            print(f"round {number}: {name} {speeds[name][-1]:,.0f} tokens/s", flush=True)
    speeds = {name: values[1:] for name, values in speeds.items()}
    report(options, speeds, statistics.median(rates), weights_read(model.config))
    return 0


def ours(model: MiniMind, prompts: Tensor, options: BenchmarkOptions) -> dict[str, Run]:
    sampling = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=options.new_tokens)

    def run(ready: InferenceModel, rows: int) -> Run:
        own = prompts[:rows].tolist()
        return lambda: sum(map(len, generate_batch(ready, own, sampling, stop_ids=())))

    ready = {weights: InferenceModel(model, weights) for weights in BYTES}
    return {f"minimind {w} × {rows}": run(ready[w], rows) for w in BYTES for rows in (1, MANY)}


def transformers_runs(model: MiniMind, prompts: Tensor, options: BenchmarkOptions) -> dict[str, Run]:
    """The same weights by way of files, in the precision that transformers loads them in and in bf16."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(transformers_config(model.config)))
        state = transformers_state_dict(model.state_dict(), model.config)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        peers = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }

    def run(peer: torch.nn.Module, rows: int) -> Run:
        own = prompts[:rows]
        length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

        def generate() -> int:
            ids = peer.generate(own, attention_mask=torch.ones_like(own), do_sample=False, **length)
            return ids[:, own.shape[1] :].numel()

        return generate

    return {f"transformers {n} × {rows}": run(peer, rows) for n, peer in peers.items() for rows in (1, MANY)}


def weights_read(config: ModelConfig) -> int:
    """How many weights one token of one answer multiplies: all but the experts it does not visit.

    The embedding counts once, as the output layer; as the input one row of it is read.
    """
    idle = config.num_experts - config.num_experts_per_tok if config.num_experts else 0
    expert = 3 * config.hidden_size * config.intermediate_size
    return config.num_parameters - config.num_hidden_layers * idle * expert


def report(options: BenchmarkOptions, speeds: dict[str, list[float]], rate: float, weights: int) -> None:
    """Print the medians and write them beside the machine they were measured on."""
    comparisons = generation(speeds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    table = Table("", "tokens/s", "times transformers", "times one answer", "of the read rate")
    for name, median in medians.items():
        kind, _, rows = name.rpartition(" × ")
        precision = kind.split()[1]
        share = f"{BYTES[precision] * weights * median / rate:.0%}" if name.startswith("mini") else ""
        table.add_row(
            name,
            median_and_spread(speeds[name]),
            f"{comparisons[int(rows)].times(kind).median:.2f}",
            f"{median / medians[f'{kind} × 1']:.2f}",
            share if rows == "1" else "",
        )
    Console().print(table)
    result = {
        "threads": torch.get_num_threads(),
        "read_bytes_per_s": rate,
        "weights_read_per_token": weights,
        "tokens_per_s": speeds,
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
    }
    write_results(options.json, options, result)


if __name__ == "__main__":
    run_cli(main)
