"""Training speed of the mixture of experts against a dense model of as much work, side by side.

    python -m benchmarks.moe_speed --data_path dataset/pretrain_hq.jsonl

The dense model's MLPs are as wide as all the experts that a token visits together, so both multiply as much
for each token; what the mixture loses is the price of sending tokens to experts, and of an optimizer that
has more weights to change. A third rival is the mixture with the usual loop, one mask over all visits for
each expert. Each trains in a process of its own, in turn, with whole steps of the real loop.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.comparisons import median_and_spread
from benchmarks.own_steps import EPOCHS, OwnSteps
from benchmarks.side_by_side import in_own_process, write_results
from minimind.config import PRESETS, ModelConfig, model_config
from minimind.errors import run_cli
from minimind.flags import flag, parse_flags
from minimind.moe import MoE
from minimind.paths import DATASET_DIR, ROOT
from minimind.stages.pretrain import PretrainOptions, stage
from minimind.train import step as training_step

T = TypeVar("T")
DENSE, OURS, MASKS = "dense", "moe", "moe, loop with masks"


@dataclass(frozen=True)
class BenchmarkOptions:
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file to train on")
    hidden_size: int = flag(640, "width of both models")
    num_hidden_layers: int = flag(8, "layers of both models")
    max_seq_len: int = flag(512, "length of a row in tokens")
    rows: int = flag(128, "rows in an optimizer step; the fewer, the more the optimizer counts")
    rounds: int = flag(3, "optimizer steps of each, after one that is not counted")
    compile: str = flag("0", "torch.compile", choices=("auto", "0", "1"))
    json: Path = flag(ROOT / "benchmarks/results/moe_speed.json", "where the results are written")


class WideMLP(ModelConfig):
    """A dense model whose MLP does the work of all experts that a token of the mixture visits."""

    @property
    def intermediate_size(self) -> int:
        return super().intermediate_size * (self.num_experts_per_tok + self.num_shared_experts)


class Spent(NamedTuple):
    """Seconds on the clock, and seconds of the processor's: those do not count what others do on it."""

    clock: float
    cpu: float


class Step(NamedTuple):
    """What one optimizer step took, in all and for forward and backward alone."""

    tokens: int
    whole: Spent
    passes: Spent

    @property
    def rates(self) -> dict[str, float]:
        return {
            "tokens_per_s": self.tokens / self.whole.clock,
            "tokens_per_cpu_s": self.tokens / self.whole.cpu,
            "tokens_per_cpu_s_of_passes": self.tokens / self.passes.cpu,
            "optimizer_cpu_s": self.whole.cpu - self.passes.cpu,
        }


def timed(work: Callable[[], T]) -> tuple[T, Spent]:
    clock, cpu = time.perf_counter(), time.process_time()
    done = work()
    return done, Spent(time.perf_counter() - clock, time.process_time() - cpu)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        rivals = {
            name: in_own_process(trainer_steps, name, options, Path(folder) / str(number))
            for number, name in enumerate((DENSE, OURS, MASKS))
        }
        steps = in_turn(rivals, options.rounds)
    report(options, steps)
    return 0


def in_turn(rivals: dict[str, Callable[[], Step]], rounds: int) -> dict[str, list[Step]]:
    """The steps of each; one round before them is not counted."""
    steps: dict[str, list[Step]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, step in rivals.items():
            steps[name].append(step())
            print(f"round {number}: {name} {steps[name][-1]}", flush=True)
    return {name: found[1:] for name, found in steps.items()}


def config_of(name: str, options: BenchmarkOptions) -> ModelConfig:
    mixture = model_config("moe", options.hidden_size, options.num_hidden_layers)
    return WideMLP(**asdict(mixture) | {"num_experts": 0}) if name == DENSE else mixture


def trainer_steps(name: str, options: BenchmarkOptions, folder: Path) -> Callable[[], Step]:
    """One optimizer step of the real loop; to be called in a process of its own, which it changes."""
    PRESETS["moe"] = config_of(name, options)
    if name == MASKS:
        MoE.visit_experts = with_masks
    train_options = PretrainOptions(
        data_path=options.data_path,
        out_dir=folder,
        preset="moe",
        max_seq_len=options.max_seq_len,
        batch_size=options.rows,
        accumulation_steps=1,
        epochs=EPOCHS,
        compile=options.compile,
        device="cpu",
    )
    steps = OwnSteps(stage(train_options), train_options)
    passes, accumulate = [], training_step.accumulate_gradients

    def accumulate_timed(*arguments: object) -> object:
        losses, spent = timed(lambda: accumulate(*arguments))
        passes.append(spent)
        return losses

    training_step.accumulate_gradients = accumulate_timed

    def step() -> Step:
        tokens, spent = timed(steps.step)
        return Step(tokens, spent, passes[-1])

    return step


def with_masks(mixture: MoE, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`MoE.visit_experts` as it is usually written: for each expert a mask over all visits."""
    top_k = experts.shape[1]
    sent = x.repeat_interleave(top_k, dim=0)  # (M·k, H)
    y = torch.empty_like(sent)
    for i, expert in enumerate(mixture.experts):
        mask = experts.flatten() == i  # (M·k,)
        y[mask] = expert(sent[mask]).to(y.dtype)
    return (y.view(*experts.shape, -1) * weights[..., None].to(y.dtype)).sum(dim=1)


def report(options: BenchmarkOptions, steps: dict[str, list[Step]]) -> None:
    """Print the medians and write all to a file. Shares are those of a round, whose steps were neighbours."""
    results = {
        name: {key: [step.rates[key] for step in found] for key in found[0].rates}
        for name, found in steps.items()
    }
    for found in results.values():
        for key in ("tokens_per_s", "tokens_per_cpu_s", "tokens_per_cpu_s_of_passes"):
            found[f"{key}_of_dense"] = shares(found, results[DENSE], key)
    table = Table("", "tokens/s", "of the dense", "by CPU seconds", "passes alone", "optimizer, CPU s")
    for name, found in results.items():
        table.add_row(
            name,
            median_and_spread(found["tokens_per_s"]),
            f"{statistics.median(found['tokens_per_s_of_dense']):.1%}",
            f"{statistics.median(found['tokens_per_cpu_s_of_dense']):.1%}",
            f"{statistics.median(found['tokens_per_cpu_s_of_passes_of_dense']):.1%}",
            f"{statistics.median(found['optimizer_cpu_s']):.2f}",
        )
    Console().print(table)
    given = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    write_results(
        options.json,
        options,
        {
            "rivals": results,
            "threads": torch.get_num_threads(),
            "data": options.data_path.name,
            "options": given,
        },
    )


def shares(found: dict[str, list[float]], dense: dict[str, list[float]], key: str) -> list[float]:
    return [rate / rival for rate, rival in zip(found[key], dense[key], strict=True)]


if __name__ == "__main__":
    run_cli(main)
