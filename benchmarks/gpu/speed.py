"""How fast a stage trains: steps of the real loop after those that compile, for some seconds."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.data import FILES
from benchmarks.gpu.jobs import wait_for_turn
from benchmarks.moe_speed import WideMLP
from minimind.config import PRESETS
from minimind.data.batches import prefetch
from minimind.estimate import STAGES, clock, for_trial
from minimind.train import loop
from minimind.train.cost import peak_memory
from minimind.train.loop import Trainer
from minimind.train.parallel import setup
from minimind.train.signals import StopSignals
from minimind.train.step import optimizer_step

WARM_UP = 3  # steps; the first ones compile
EPOCH_TOKENS = 330e6  # of pretrain_hq
TINY = {  # of a dry run
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "max_seq_len": 256,
    "batch_size": 2,
    "accumulation_steps": 1,
    "num_workers": 1,
}


@dataclass(frozen=True)
class Job:
    stage: str
    preset: str


@dataclass(frozen=True)
class Setting:
    """What all jobs share."""

    device: str
    data: Path  # folder of the files
    seconds: float  # of measured steps
    dry_run: bool


def build(job: Job, setting: Setting, folder: Path, **more: Any) -> Trainer:
    module = import_module(f"minimind.stages.{job.stage}")
    flags = {
        "preset": job.preset,
        "device": setting.device,
        "data_path": setting.data / f"{FILES[job.stage]}.jsonl",
        "epochs": 10_000,  # of a small file, as many as it takes
        "on_bad_record": "skip",
        **more,
    }
    if setting.dry_run:
        flags |= TINY | {"preset": None, "use_moe": job.preset == "moe", "compile": "0"}
        flags |= {"teacher_preset": "tiny"} if job.stage == "distill" else {}
    options = for_trial(getattr(module, STAGES[job.stage])(**flags), folder)
    with patch.dict(PRESETS, wide=WideMLP(**asdict(PRESETS["moe"]) | {"num_experts": 0})):
        trainer = Trainer(module.stage(options), options, setup(setting.device, "auto"))
    trainer.peak_rate = 1.0  # the report has its own
    if trainer.objective.scores_first:
        trainer.data.reference.zero_()  # any score will do
    return trainer


def measure(job: Job, setting: Setting) -> dict[str, Any]:
    """Useful tokens a second, floating-point operations a token, and the peak of memory.

    All that compiles and warms up may happen beside other jobs, what is measured not. The GPU is waited for
    before it and after: in between it is as in a run, where the next pass is prepared during an update.
    """
    with tempfile.TemporaryDirectory(prefix="minimind_gpu_") as folder:
        began = time.perf_counter()
        trainer = build(job, setting, Path(folder))
        built = time.perf_counter()
        shares, steps = trainer.shares, warmed_up(trainer)
        warm = time.perf_counter()
        if trainer.parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # it is the others' now
        wait_for_turn()
        if steps is None:  # memory ran out, perhaps only because of the others
            trainer.shares = shares
        while steps is None:  # as a run does, again with fewer rows at once
            steps = warmed_up(trainer)
        seconds, tokens, last = [], [], clock(trainer)
        with closing(steps):
            for values in steps:
                now = time.perf_counter()
                seconds.append(now - last)
                tokens.append(values["tokens"])
                last = now
                if sum(seconds) > setting.seconds:
                    break
        seconds[-1] += clock(trainer) - last
        return {
            "tokens_per_s": sum(tokens) / sum(seconds),
            "step_s": statistics.median(seconds),
            "slowest_step_s": max(seconds),
            "steps": len(seconds),
            "rows": [trainer.shares.rows_per_step, trainer.options.max_seq_len],
            "rows_at_once": trainer.shares.rows_at_once,
            "padding": trainer.data.padding_fraction,
            "flops_per_token": trainer.flops_per_token,
            "peak_gb": peak_memory(trainer.parallel.device) / 1e9,
            "dtype": str(trainer.parallel.dtype).removeprefix("torch."),
            "compiled": trainer.compiled,
            "build_s": built - began,
            "compile_s": warm - built - WARM_UP * statistics.median(seconds),
            "last_loss": values["loss"],
        }


Steps = Generator[dict[str, float], None, None]


def warmed_up(trainer: Trainer) -> Steps | None:
    """The steps of `trainer` after those that compile; None when memory ran out, and it will use less."""
    steps = steps_of(trainer)
    if sum(1 for _ in islice(steps, WARM_UP)) < WARM_UP:
        return None
    clock(trainer)
    return steps


def steps_of(trainer: Trainer) -> Steps:
    """What each step logs, until memory runs out."""
    with closing(prefetch(trainer.step_batches(0))) as steps:
        for step, batches in enumerate(steps):
            values = optimizer_step(trainer, step, batches, StopSignals())
            if values is None:
                return
            yield values


def stretch(steps: int, setting: Setting) -> dict[str, Any]:
    """A whole run of `small` of so many steps, with evaluations, log and checkpoints; and from it an epoch.

    A run has as many evaluations whatever its length. So an epoch is taken to have its steps at the median
    pace of these, and everything else once: the start, compiling, the evaluations, saving and the report.
    """
    ends = []

    def step_ended(*arguments: Any) -> dict[str, float] | None:
        values = optimizer_step(*arguments)
        ends.append(time.perf_counter())
        return values

    with tempfile.TemporaryDirectory(prefix="minimind_gpu_") as folder:
        began = time.perf_counter()
        trainer = build(Job("pretrain", "small"), setting, Path(folder), max_steps=steps)
        with patch.object(loop, "optimizer_step", step_ended):
            trainer.run()
        run = clock(trainer) - began
        lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    step_s = statistics.median(after - before for before, after in pairwise(ends))
    rest = run - steps * step_s
    return {
        "steps": steps,
        "tokens": trainer.tokens,
        "run_s": run,
        "step_s": step_s,
        "rest_s": rest,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "epoch_h": (rest + step_s * steps * EPOCH_TOKENS / trainer.tokens) / 3600,
    }
