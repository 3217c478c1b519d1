"""What a run says: a live line in the terminal, `metrics.jsonl` always, loggers on request."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from minimind.errors import discard_output
from minimind.files import write_text
from minimind.model import MiniMind
from minimind.runs import LOG
from minimind.train.loggers import Loggers, RunInfo
from minimind.train.signals import output_may_break

EVALUATION = {  # how the scores on held-out data are shown
    "eval_loss": "loss {:.3f}",
    "eval_bpb": "{:.4f} bits per byte",
    "eval_accuracy": "{:.1%} of pairs as preferred",
    "eval_reward_accuracy": "{:.1%} moved towards the preferred",
    "eval_margin": "margin {:.3f}",
}


class Output(Console):
    def on_broken_pipe(self) -> None:  # rich would end the process
        discard_output()


class Monitor:
    """Log sink of the main process; the other processes of a run have one that stays silent."""

    def __init__(
        self, folder: Path, *, is_main: bool, total_steps: int, first_step: int, log_interval: int
    ) -> None:
        self.console = Output(stderr=False, quiet=not is_main, highlight=False, soft_wrap=True)
        self.is_main = is_main
        self.log_interval = log_interval
        self.total_steps = total_steps
        self.started, self.first_step = time.perf_counter(), first_step
        self.loggers: Loggers | None = None
        self.logged_to: tuple[Sequence[str], RunInfo] | None = None
        self.path = folder / LOG
        self.file: TextIO | None = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.open_log(first_step)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} [dim]{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not (is_main and sys.stdout.isatty()),
            transient=True,
        )
        self.task = self.progress.add_task("step", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> Monitor:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
        if self.loggers:
            self.loggers.finish()

    def open_log(self, first_step: int) -> None:
        keep_lines_before(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")

    def go_back(self, step: int) -> None:
        """Take back the steps after `step`, which are about to be done again."""
        if self.file:
            self.file.close()
            self.open_log(step)
        self.started, self.first_step = time.perf_counter(), step
        if self.loggers and self.logged_to:  # they take no step back, but begin again as in a resumed run
            self.loggers.finish()
            self.start_loggers(*self.logged_to)

    def start_loggers(self, names: Sequence[str], run: RunInfo) -> None:
        """Log to these libraries too, beginning with the steps that a resumed run has behind it."""
        if not (self.is_main and names):
            return
        self.logged_to = names, run
        self.loggers = Loggers(names, run, self.say)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            self.loggers.log(values.pop("step"), values)

    def say(self, message: str) -> None:
        with output_may_break():
            self.console.print(message, markup=False)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log one optimizer step; `step` counts finished ones."""
        self.write(step, values)
        remaining = (
            (time.perf_counter() - self.started) / (step - self.first_step) * (self.total_steps - step)
        )
        status = (
            f"loss {values['loss']:.3f} · {values['tokens_per_s']:,.0f} tokens/s · MFU {values['mfu']:.0%}"
        )
        self.progress.update(self.task, completed=step, status=f"{status} · {duration(remaining)} left")
        if step % self.log_interval == 0 or step in (self.first_step + 1, self.total_steps):
            self.say(
                f"step {step}/{self.total_steps} · {status} · lr {values['lr']:.2e} · "
                f"{duration(remaining)} left"
            )

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.write(step, values)
        shown = " · ".join(f"{EVALUATION[name].format(value)}" for name, value in values.items())
        self.say(f"step {step}/{self.total_steps} · held out: {shown}")

    def write(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.file:
            try:
                if not self.path.exists():
                    self.say(f"{self.path.parent} is gone; it is made anew, without what was in it")
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.file = self.path.open("a", encoding="utf-8")
                self.file.write(json.dumps({"step": step} | values, allow_nan=False) + "\n")
                self.file.flush()
            except OSError as error:  # a full disk; the training itself needs no log
                self.say(f"metrics.jsonl cannot be written any more ({error.strerror}); training goes on")
                self.file = None
        if self.loggers:
            self.loggers.log(step, values)


def keep_lines_before(path: Path, step: int) -> None:
    """Cut `metrics.jsonl` back to the steps that a run has behind it; a new one starts empty."""
    kept = []
    if step > 0 and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # the last line of a killed run
                continue
    write_text(path, "".join(kept))


def duration(seconds: float) -> str:
    """`75 s`, `12.5 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product here: what "100 % MFU" means.

    Measured rather than looked up, so that it is right for any processor.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        a @ a
        finish_work(device)
        return time.perf_counter() - start

    seconds()  # the first one pays for the kernel's set-up
    rate = 2 * size**3 / min(seconds() for _ in range(3))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the training's peak is wanted, not that of this
    return rate


def finish_work(device: torch.device) -> None:
    """Wait until `device` has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def training_flops(model: MiniMind) -> float:
    """Floating-point operations of a training step for each token, without attention.

    Two for each parameter a token meets forward, two backward, and two more where the parameter is trained
    (Kaplan et al. 2020, arXiv:2001.08361).
    """
    config = model.config
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0  # of the experts
    return sum(
        parameter.numel() * (6 if parameter.requires_grad else 4) * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
    )
