"""Training speed beside the original's recipe and litgpt, on the same records with the same tokenizer.

    python -m benchmarks.train_speed --data_dir dataset --litgpt_python litgpt/bin/python

original's recipe  transformers' Llama in fp32, each record cut or padded to `max_seq_len`, AdamW
minimind           what `train_pretrain.py` and `train_full_sft.py` run, rows made ahead by a thread
litgpt             `litgpt pretrain` with its defaults (bf16-mixed, torch.compile, AdamW) on pieces of
                   `max_seq_len` tokens, documents seeing each other; pretraining alone. It needs a Python of
                   its own, see benchmarks/litgpt.txt

All train the same shape of model, as many rows in a step, each in a process of its own, in turn, so that a
noisy machine disturbs all alike. A useful token is a position that is not padding and has a next token of its
row to predict. A share of the matrix-product rate counts 6 operations for a parameter and useful token. It is
of the rate meanwhile, seen by a product before each pass forward and backward of one step: on a shared
machine the rate changes by more than half within seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparisons import RECIPE, median_and_spread, training
from benchmarks.own_steps import EPOCHS, OwnSteps
from benchmarks.peers.litgpt_peer import check_python, litgpt_steps
from benchmarks.peers.recipe import padded_fp32
from benchmarks.side_by_side import (
    Work,
    in_own_process,
    note,
    notes,
    rates_in_turn,
    write_results,
)
from benchmarks.stage_speed import find_data
from benchmarks.step_profile import profile_step
from minimind.config import PRESETS
from minimind.data.records import Kind
from minimind.errors import run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR, ROOT
from minimind.stages import pretrain, sft
from minimind.train.loop import Trainer

DATA: dict[str, Kind] = {"pretrain_hq": "pretrain", "sft_mini_512": "conversation"}
BATCH = {"tiny": (16, 1), "small": (16, 4), "base": (8, 8)}  # rows in a pass, passes in a step
PRODUCT = 2048  # rows and columns of the matrices whose product shows the machine's rate
AHEAD = 2  # steps whose rows `prefetch` has made before they are asked for
NO_LITGPT = "not measured: no --litgpt_python"


@dataclass(frozen=True)
class BenchmarkOptions:
    presets: tuple[str, ...] = flag(("small", "base"), "model sizes", choices=(*BATCH,))
    data_dir: Path = flag(DATASET_DIR, "folder of pretrain_hq and sft_mini_512, plain or .gz")
    max_seq_len: int = flag(512, "length of a row in tokens")
    batch_size: int | None = flag(None, "rows in a pass; without it 16, with base 8")
    rounds: int = flag(5, "optimizer steps of each, after one that is not counted")
    compile: str = flag("auto", "torch.compile in minimind; 0: nor in litgpt", choices=("auto", "0", "1"))
    litgpt_python: Path | None = flag(None, "Python where litgpt is; without it litgpt is left out")
    profile: bool = flag(False, "also show what a step of minimind (small, pretraining) spends its time on")
    json: Path = flag(ROOT / "benchmarks/results/train_speed.json", "where the results are written")


@dataclass(frozen=True)
class Setting:
    """One line of comparisons: what all rivals train, and on what."""

    preset: str
    data: str
    path: Path
    max_seq_len: int
    rows: int
    passes: int
    compile: str

    @property
    def kind(self) -> Kind:
        return DATA[self.data]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(BenchmarkOptions, argv, __doc__)
    if options.litgpt_python:
        check_python(options.litgpt_python)
    found = settings(options)
    results = [measure(setting, options) for setting in found]
    written: dict[str, Any] = {"settings": results}
    if options.profile:
        written["profile"] = profiled(found)
    report(results, written.get("profile"))
    write_results(options.json, options, written)
    return 0


def settings(options: BenchmarkOptions) -> list[Setting]:
    paths = {name: find_data(options.data_dir, name) for name in DATA}
    found = []
    for preset in options.presets:
        rows, passes = BATCH[preset]
        rows = options.batch_size or rows
        found += [
            Setting(preset, name, path, options.max_seq_len, rows, passes, options.compile)
            for name, path in paths.items()
        ]
    return found


def measure(setting: Setting, options: BenchmarkOptions) -> dict[str, Any]:
    """All rivals of one setting in turn."""
    print(f"{setting.preset}, {setting.data}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = rates_in_turn(rivals(setting, options.litgpt_python, folder), options.rounds)
        (shares,) = notes(folder / "shares.jsonl")
    return {
        "preset": setting.preset,
        "data": setting.data,
        "max_seq_len": setting.max_seq_len,
        "rows": setting.rows,
        "passes": setting.passes,
        "tokens_per_s": rates,
        "litgpt": None if setting.kind == "conversation" or options.litgpt_python else NO_LITGPT,
        **shares,
    }


def rivals(setting: Setting, litgpt_python: Path | None, folder: Path) -> dict[str, Work]:
    where = (setting.preset, setting.path)
    shape = (setting.max_seq_len, setting.rows, setting.passes)
    found = {
        RECIPE: in_own_process(padded_fp32, *where, setting.kind, *shape),
        "minimind": in_own_process(minimind, setting, folder),
    }
    if litgpt_python and setting.kind == "pretrain":
        found["litgpt"] = litgpt_steps(litgpt_python, *where, *shape, setting.compile != "0", folder)
    return found


def minimind(setting: Setting, folder: Path) -> Work:
    """One optimizer step of this project's loop; returns its useful tokens.

    The first call is not counted, and makes several. In the turns of the others the thread that makes rows
    has all the time it wants, so whether a step waits for it must be seen in steps that follow each other.
    """
    steps = own_steps(setting, folder, setting.compile)
    is_first = True

    def step() -> int:
        nonlocal is_first
        tokens = steps.step()
        if is_first:
            is_first = False
            note(folder / "shares.jsonl", **shares(steps, setting.preset))
        return tokens

    return step


def shares(steps: OwnSteps, preset: str) -> dict[str, float]:
    """What a step makes of the machine, right after the steps whose rows were there before."""
    for _ in range(AHEAD):
        steps.step()
    with products_between_passes(steps.trainer) as seconds:
        tokens = steps.step()
    took = steps.took - sum(seconds)
    rate = 2 * PRODUCT**3 * len(seconds) / sum(seconds)  # operations a second
    return {
        "of_matmul_rate": 6 * PRESETS[preset].num_parameters * tokens / took / rate,
        "matmul_bf16_flops": rate,
        "waiting_for_data": steps.waited / took,
    }


@contextmanager
def products_between_passes(trainer: Trainer) -> Iterator[list[float]]:
    """A product of two bf16 matrices before each pass forward and backward; gives their seconds."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, dtype=torch.bfloat16)
    out = a @ b  # the first one pays for the kernel's set-up
    seconds = []

    def after_a_product(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - began)
            return function(*arguments)

        return call

    objective, engine = trainer.objective, trainer.engine
    with (
        patch.object(objective, "loss", after_a_product(objective.loss)),
        patch.object(engine, "backward", after_a_product(engine.backward)),
    ):
        yield seconds


def own_steps(setting: Setting, folder: Path, compile: str) -> OwnSteps:
    module, options = (
        (pretrain, pretrain.PretrainOptions) if setting.kind == "pretrain" else (sft, sft.SFTOptions)
    )
    train_options = options(
        data_path=setting.path,
        out_dir=folder,
        preset=setting.preset,
        from_weight="none",  # a stage's weights make no difference to its speed
        max_seq_len=setting.max_seq_len,
        batch_size=setting.rows,
        accumulation_steps=setting.passes,
        epochs=EPOCHS,
        compile=compile,
        device="cpu",
    )
    return OwnSteps(module.stage(train_options), train_options)


def profiled(found: list[Setting]) -> dict[str, Any]:
    """Seconds of each part of a step of `small`, or of the first size that was asked for, in pretraining."""
    setting = next((s for s in found if s.preset == "small"), found[0])
    with tempfile.TemporaryDirectory() as folder:
        seconds = profile_step(own_steps(setting, Path(folder), compile="0"))
    return {"preset": setting.preset, "data": setting.data, "compile": "0", "seconds": seconds}


def report(results: list[dict[str, Any]], profile: dict[str, Any] | None) -> None:
    table = Table(
        "", "data", "", "useful tokens/s", "times the recipe", "of the bf16 matmul rate", "waiting for data"
    )
    for result, comparison in zip(results, training(results), strict=True):
        for rival, values in comparison.rates.items():
            own = [f"{result[share]:.1%}" for share in ("of_matmul_rate", "waiting_for_data")]
            table.add_row(
                result["preset"],
                result["data"],
                rival,
                median_and_spread(values),
                f"{comparison.times(rival).median:.2f}",
                *(own if rival == "minimind" else ()),
            )
        if result["litgpt"]:
            table.add_row(result["preset"], result["data"], "litgpt", result["litgpt"])
    Console().print(table)
    if profile:
        parts = Table(f"a step of {profile['preset']}, not compiled", "seconds", "share")
        took = sum(profile["seconds"].values())
        for part, seconds in profile["seconds"].items():
            parts.add_row(part, f"{seconds:.2f}", f"{seconds / took:.0%}")
        Console().print(parts)


if __name__ == "__main__":
    run_cli(main)
