"""How long until a model is as good as the original's recipe makes it, side by side.

    python -m benchmarks.time_to_quality --minutes 20

The recipe: transformers' Llama in fp32, each record cut or padded to `max_seq_len`, AdamW at 5e-4 with the
original's cosine from 1.1 to 0.1 times that. Ours: what `train_pretrain.py` runs, given a quarter of the
recipe's time. Quality is bits per byte of held-out text, measured by the same code for both, with the clocks
stopped. Each is in a process of its own, and they take turns, so that a noisy machine disturbs both alike.
A clock starts before the model is built: compiling counts, with the compiler's cache warm as in any run but
the first.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparisons import OURS, RECIPE, Point, races
from benchmarks.own_steps import EPOCHS, OwnSteps
from benchmarks.peers.recipe import OriginalRecipe, encoded_records
from benchmarks.pictures import draw_quality
from benchmarks.side_by_side import Work, in_own_process, write_results
from minimind.data.batches import PackedDataset
from minimind.errors import run_cli
from minimind.evaluate.bits_per_byte import bits_per_byte
from minimind.flags import flag, parse_flags
from minimind.model import MiniMind
from minimind.paths import DATASET_DIR, ROOT
from minimind.stages.pretrain import PretrainOptions, stage
from minimind.train.loop import Trainer

EVAL_ROWS = 96  # of max_seq_len
RECORDS = 46_000  # of the recipe, more than it gets through


@dataclass(frozen=True)
class BenchmarkOptions:
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file to train on")
    eval_path: Path = flag(DATASET_DIR / "pretrain_val.jsonl", "JSONL file to measure the quality on")
    presets: tuple[str, ...] = flag(("tiny", "small"), "model sizes", choices=("tiny", "small", "base"))
    minutes: float = flag(20.0, "that the recipe trains")
    part: float = flag(0.25, "of that time for ours")
    evaluations: int = flag(20, "measurements of each")
    max_seq_len: int = flag(512, "length of a row in tokens")
    recipe_rows: int = flag(8, "rows in an optimizer step of the recipe")
    rows: int = flag(8, "rows in an optimizer step of ours")
    compile: str = flag("1", "torch.compile in ours", choices=("0", "1"))
    json: Path = flag(ROOT / "benchmarks/results/time_to_quality.json", "where the results are written")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    curves = {preset: learning_curves(replace(options, presets=(preset,))) for preset in options.presets}
    report(options, curves)
    return 0


def learning_curves(options: BenchmarkOptions) -> dict[str, list[Point]]:
    budget = options.minutes * 60
    seconds = {RECIPE: budget, OURS: budget * options.part}
    with tempfile.TemporaryDirectory() as folder:
        works = {}
        for name, prepare in ((RECIPE, original), (OURS, minimind)):
            works[name] = in_own_process(prepare, options, seconds[name], Path(folder) / prepare.__name__)
            works[name](0.0)  # prepared before the other begins
        curves: dict[str, list[Point]] = {name: [] for name in works}
        for number in range(1, options.evaluations + 1):
            for name, train_until in works.items():
                curves[name].append(Point(*train_until(seconds[name] * number / options.evaluations)))
                shown = curves[name][-1]
                print(
                    f"{options.presets[0]}: {name} after {shown.seconds:,.0f} s, {shown.tokens:,} tokens: "
                    f"{shown.bits_per_byte:.3f} bits per byte",
                    flush=True,
                )
    return curves


def original(options: BenchmarkOptions, budget: float, folder: Path) -> Work:
    """The original's recipe; returns what trains until its clock stands at so many seconds."""
    judge = own_steps(options, folder, max_steps=1).trainer  # knows how to measure
    records = list(islice(encoded_records(options.data_path, "pretrain"), RECORDS))
    random.Random(0).shuffle(records)

    began = time.perf_counter()
    torch.manual_seed(0)
    recipe = OriginalRecipe(options.presets[0], cycle(records), options.max_seq_len, options.recipe_rows)
    clock, tokens = time.perf_counter() - began, 0

    def train_until(seconds: float) -> Point:
        nonlocal clock, tokens
        while clock < seconds:
            began = time.perf_counter()
            scale = 0.1 + 0.5 * (1 + math.cos(math.pi * min(1.0, clock / budget)))
            tokens += recipe.step(scale)
            clock += time.perf_counter() - began
        judge.model.load_state_dict(recipe.model.state_dict())
        return Point(clock, tokens, quality(judge.model, judge))

    return train_until


def minimind(options: BenchmarkOptions, budget: float, folder: Path) -> Work:
    """This project's loop, with as many steps as fit in `budget` seconds by what the first ones take."""
    steps_fitting = measure_steps(options, budget, folder / "measured")
    began = time.perf_counter()
    steps = own_steps(options, folder, steps_fitting)
    clock, tokens, done = time.perf_counter() - began, 0, 0

    def train_until(seconds: float) -> Point:
        nonlocal clock, tokens, done
        while clock < seconds and done < steps_fitting:
            tokens += steps.step()
            done += 1
            clock += steps.took
        return Point(clock, tokens, quality(steps.trainer.model, steps.trainer))

    return train_until


def measure_steps(options: BenchmarkOptions, budget: float, folder: Path, steps: int = 8) -> int:
    """How many optimizer steps fit into `budget` seconds, the start of a run included."""
    own_steps(options, folder, steps)  # from here on tokens and compiled code are cached
    began = time.perf_counter()
    own = own_steps(options, folder, steps)
    start, took = time.perf_counter() - began, []
    for _ in range(steps):
        own.step()
        took.append(own.took)
    first, usual = took[0], statistics.median(took[1:])
    return max(steps, int((budget - start - first) / usual))


def own_steps(options: BenchmarkOptions, folder: Path, max_steps: int) -> OwnSteps:
    train_options = PretrainOptions(
        data_path=options.data_path,
        eval_path=options.eval_path,
        out_dir=folder,
        preset=options.presets[0],
        max_seq_len=options.max_seq_len,
        batch_size=options.rows,
        accumulation_steps=1,
        max_steps=max_steps,
        epochs=EPOCHS,
        compile=options.compile,
        device="cpu",
    )
    return OwnSteps(stage(train_options), train_options)


def quality(model: MiniMind, trainer: Trainer) -> float:
    held_out: PackedDataset = trainer.held_out
    rows = min(EVAL_ROWS, held_out.num_rows)
    return bits_per_byte(model, held_out, trainer.tokenizer, trainer.parallel, 8, rows).bits_per_byte


def report(options: BenchmarkOptions, curves: dict[str, dict[str, list[Point]]]) -> None:
    """Print when each preset got there, draw the curves and write them."""
    table = Table("preset", "bits per byte of the recipe", "its time", "ours", "share")
    shares = {}
    for preset, race in races(curves):
        shares[preset] = race.share
        reached = f"{race.seconds:,.0f} s" if race.seconds else f"not reached: {race.last.bits_per_byte:.3f}"
        share = f"{race.share:.0%}" if race.share else ""
        table.add_row(preset, f"{race.goal:.3f}", f"{race.recipe_seconds:,.0f} s", reached, share)
    Console().print(table)
    results = {
        "data": options.data_path.name,
        "held_out": options.eval_path.name,
        "share_of_the_recipes_time": shares,
        "curves": {
            preset: {name: [point._asdict() for point in curve] for name, curve in pair.items()}
            for preset, pair in curves.items()
        },
    }
    write_results(options.json, options, results)
    draw_quality(options.json.with_suffix(".svg"), results)


if __name__ == "__main__":
    run_cli(main)
