"""How fast a stage trains: steps of the real loop after those that compile, for some seconds."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.data import FILES
from benchmarks.moe_speed import WideMLP
from minimind.config import PRESETS
from minimind.data.batches import prefetch
from minimind.estimate import STAGES, clock, for_trial
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
    """Useful tokens a second, floating-point operations a token, and the peak of memory."""
    with tempfile.TemporaryDirectory(prefix="minimind_gpu_") as folder:
        began = time.perf_counter()
        trainer = build(job, setting, Path(folder))
        built = time.perf_counter()
        seconds, tokens = [], []
        while not seconds:  # out of memory: as a run does, again with fewer rows at once
            seconds, tokens, loss = timed_steps(trainer, setting.seconds)
        counted = seconds[WARM_UP:]
        return {
            "tokens_per_s": sum(tokens[WARM_UP:]) / sum(counted),
            "step_s": statistics.median(counted),
            "slowest_step_s": max(counted),
            "steps": len(counted),
            "rows": [trainer.shares.rows_per_step, trainer.options.max_seq_len],
            "rows_at_once": trainer.shares.rows_at_once,
            "padding": trainer.data.padding_fraction,
            "flops_per_token": trainer.flops_per_token,
            "peak_gb": peak_memory(trainer.parallel.device) / 1e9,
            "dtype": str(trainer.parallel.dtype).removeprefix("torch."),
            "compiled": trainer.compiled,
            "build_s": built - began,
            "compile_s": sum(seconds[:WARM_UP]) - WARM_UP * statistics.median(counted),
            "last_loss": loss,
        }


def timed_steps(trainer: Trainer, enough: float) -> tuple[list[float], list[int], float]:
    """Seconds and useful tokens of each step, and the last loss; empty when memory ran out."""
    seconds, tokens = [], []
    with closing(prefetch(trainer.step_batches(0))) as steps:
        last = clock(trainer)
        for step, batches in enumerate(steps):
            values = optimizer_step(trainer, step, batches, StopSignals())
            if values is None:
                return [], [], 0.0
            now = clock(trainer)
            seconds.append(now - last)
            tokens.append(values["tokens"])
            last = now
            if len(seconds) > WARM_UP and sum(seconds[WARM_UP:]) > enough:
                break
    return seconds, tokens, values["loss"]


def stretch(steps: int, setting: Setting) -> dict[str, Any]:
    """A whole run of `small` of so many steps, with evaluation, log and checkpoints; and from it an epoch.

    All but the compiling is taken to grow with the tokens: a little too much, as evaluations do not.
    """
    with tempfile.TemporaryDirectory(prefix="minimind_gpu_") as folder:
        trainer = build(Job("pretrain", "small"), setting, Path(folder), max_steps=steps, eval_interval=steps)
        began = clock(trainer)
        trainer.run()
        run = clock(trainer) - began
        lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [line for line in map(json.loads, lines) if "loss" in line]
    durations = [line["tokens"] / line["tokens_per_s"] for line in logged]
    start = max(0.0, sum(durations[:WARM_UP]) - WARM_UP * statistics.median(durations))
    return {
        "steps": steps,
        "tokens": trainer.tokens,
        "run_s": run,
        "compile_s": start,
        "first_loss": logged[0]["loss"],
        "last_loss": logged[-1]["loss"],
        "epoch_h": (start + (run - start) * EPOCH_TOKENS / trainer.tokens) / 3600,
    }
