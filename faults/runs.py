"""Very small trainings by the command, to be killed, stopped and starved; and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minimind.paths import ROOT
from minimind.train.checkpoint import list_checkpoints, load_state

PATIENCE = 120  # seconds in which anything that must happen has happened on a busy machine
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "max_seq_len": 64}
FIXED = {"dtype": "float32", "compile": 0, "device": "cpu", "batch_size": 4, "global_batch_size": 8}


@dataclass
class Run:
    """One training in a folder of its own, to be started as often as it takes."""

    folder: Path
    flags: dict[str, Any]
    said_at: Path  # not in the folder, which may be on a full disk
    processes: int = 1

    def start(self, *more: str, launcher: tuple[str, ...] = (), **changed: Any) -> Process:
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = MODEL | FIXED | self.flags | {"out_dir": self.folder / "out"} | changed
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command += [*launcher, str(ROOT / "trainer" / "train_pretrain.py")]
        command += [f"--{name}={value}" for name, value in flags.items()]
        return Process([*command, *more], self)

    def copy(self, folder: Path) -> Run:
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder, said_at=folder.with_suffix(".said"))

    @property
    def run_dir(self) -> Path:
        return self.folder / "out" / "runs" / "pretrain_64"

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.run_dir / "checkpoints")

    def metrics(self) -> list[dict[str, float]]:
        """What the run has logged up to now; the last line may be half written."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def step(self) -> int:
        logged = self.metrics()
        return int(logged[-1]["step"]) if logged else 0

    def unfinished(self) -> set[Path]:
        """What a write that is going on, or was broken off, has made up to now."""
        found = set()
        for folder, names, files in os.walk(self.folder / "out"):  # folders may vanish under it
            steps = [Path(folder, name) for name in names if name.startswith("step_")]
            found.update(path for path in steps if not path.with_suffix(".sha256").exists())
            found.update(Path(folder, name) for name in files if name.endswith(".tmp"))
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Model and optimizers of the last checkpoint, flat."""
        state = load_state(self.checkpoints[-1])
        return dict(flat({"model": state["model"], "optimizers": state["optimizers"]}))


def flat(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [pair for key, inner in items for pair in flat(inner, f"{name}/{key}")]


def difference(a: Run, b: Run) -> float:
    """The largest difference of two runs' weights; raises when not even their steps are the same."""
    first, second = a.tensors(), b.tensors()
    assert first.keys() == second.keys(), "other tensors"
    assert a.checkpoints[-1].name == b.checkpoints[-1].name, "another last step"
    weights = [name for name in first if name.startswith("/model")]
    return max((first[name] - second[name]).abs().max().item() for name in weights)


def same_bits(a: Run, b: Run) -> bool:
    """Whether weights and optimizer state are the same bit by bit."""
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


class Process:
    """A training that is under way."""

    def __init__(self, command: list[str], run: Run) -> None:
        self.run, self.output = run, run.said_at
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.output.open("wb") as file:
            self.popen = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        return self.popen.poll() is None

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait for `condition`; False when the process has ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running():
                return condition()
            if time.monotonic() > deadline:
                self.kill()  # else it runs on beside the next fault
                raise AssertionError(f"nothing in {seconds:g} s; it said:\n{self.said()[-2000:]}")
            time.sleep(0.002)
        return True

    def until_training(self, steps: int = 1) -> bool:
        """Wait until `steps` steps of this start are done."""
        if not self.until(lambda: "matrix products here run at" in self.said()):
            return False
        first = self.run.step()
        return self.until(lambda: self.run.step() >= first + steps)

    def workers(self) -> list[int]:
        """The processes that a launcher has started, by rank."""
        pids = sorted(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        return [pid for pid in pids if b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]

    def resident_memory(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def kill(self) -> None:
        for pid in [*(self.workers() if self.run.processes > 1 else []), self.pid]:
            os.kill(pid, signal.SIGKILL)
        self.popen.wait()

    def end(self, seconds: float = 2 * PATIENCE) -> int:
        """Wait for the end; returns the exit code."""
        try:
            return self.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end in {seconds:g} s; it said:\n{self.said()[-2000:]}") from None

    def must_succeed(self) -> None:
        code = self.end()
        assert code == 0, f"exit code {code}; it said:\n{self.said()[-2000:]}"


class Lab:
    """Where faults are made: a folder, data, and the undisturbed runs to compare with."""

    def __init__(self, folder: Path, data: Path, seed: int) -> None:
        self.folder, self.data, self.rng = folder, data, random.Random(seed)
        self.undisturbed: dict[str, Run] = {}

    def run(self, name: str, steps: int, processes: int = 1, **flags: Any) -> Run:
        """A training of `steps` steps that saves at every other one."""
        given = {"data_path": self.data, "max_steps": steps, "epochs": 1000, "save_interval": 2}
        # Muon rounds to bf16 within and turns another order of a sum into another step.
        precise = {"optimizer": "adamw"} if processes > 1 else {}
        said_at = self.folder / f"{name.replace('/', '_')}.said"
        return Run(self.folder / name, given | precise | {"log_interval": 1000} | flags, said_at, processes)

    def reference(self, run: Run) -> Run:
        """The same training, undisturbed."""
        key = json.dumps([run.flags, run.processes], default=str)
        if key not in self.undisturbed:
            name = f"undisturbed_{len(self.undisturbed)}"
            calm = replace(run, folder=self.folder / name, said_at=self.folder / f"{name}.said")
            calm.start().must_succeed()
            self.undisturbed[key] = calm
        return self.undisturbed[key]
