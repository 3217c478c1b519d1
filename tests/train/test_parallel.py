"""The same training, however many processes share it and however they do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.chat.questions import BEGINNINGS
from minimind.errors import UserError
from minimind.evaluate.run_report import SAMPLES
from minimind.paths import ROOT
from minimind.train.checkpoint import list_checkpoints
from minimind.train.loop import Trainer
from minimind.train.parallel import setup
from minimind.train.shares import Shares

from .conftest import PRETRAIN, SIZE, metrics, run, write_jsonl

STEPS = 20


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_each_row_is_trained_on_once_an_epoch_and_all_processes_meet(batch_size, world_size):
    ranks = [Shares(43, 10, batch_size, rank, world_size) for rank in range(world_size)]
    assert {shares.steps_per_epoch for shares in ranks} == {5}
    for epoch in range(2):
        rows = []
        for step in range(5 * epoch, 5 * epoch + 5):
            assert {shares.epoch(step) for shares in ranks} == {epoch}
            passes = [shares.passes(step) for shares in ranks]
            assert len({len(own) for own in passes}) == 1
            in_step = sorted(row for own in passes for place in own for row in place)
            assert in_step == list(range(step % 5 * 10, min(step % 5 * 10 + 10, 43)))
            assert all(len(place) <= batch_size for own in passes for place in own)
            rows += in_step
        assert rows == list(range(43))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "lengths"),
    [(12, 1, [8, 8]), (7, 1, [6, 6, 4]), (16, 1, [16]), (5, 2, [4, 4])],
)
def test_the_passes_of_a_step_are_even(batch_size, world_size, lengths):
    shares = Shares(100, 16, batch_size, 0, world_size)
    assert [len(rows) for rows in shares.passes(0)] == lengths


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def launch(
    processes: int, *flags: str, launcher: Callable[[int], list[str]] = torchrun
) -> subprocess.CompletedProcess:
    script = [str(ROOT / "trainer" / "train_pretrain.py"), "--epochs=9", "--batch_size=4"]
    return subprocess.run(
        [sys.executable, *launcher(processes), *script, "--global_batch_size=12", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def train(options, out_dir: Path, processes: int, *more: str, launcher=torchrun) -> list[float]:
    """Train by the command, with its launcher; returns the losses."""
    names = (
        "optimizer",
        "data_path",
        "dtype",
        "compile",
        "learning_rate",
        "max_steps",
        "save_interval",
        *SIZE,
    )
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    for _ in range(2):
        done = launch(processes, *flags, f"--out_dir={out_dir}", *more, launcher=launcher)
        if "exitcode  : -6" not in done.stderr:  # gloo aborted once in about 50 starts, on a busy machine
            break
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (out_dir / "runs" / "pretrain_64" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def alone(options) -> Trainer:
    """One process, 20 steps of 12 rows, with a checkpoint half-way.

    By AdamW: Muon rounds to bf16 within, and turns another last bit into another step (3e-5 of the loss).
    """
    given = replace(
        options, batch_size=12, accumulation_steps=1, max_steps=STEPS, epochs=9, optimizer="adamw"
    )
    return run(replace(given, save_interval=10), PRETRAIN)


def stopped_half_way(out_dir: Path, copy: Path) -> Path:
    """A copy of a finished run that has only its first checkpoint."""
    shutil.copytree(out_dir, copy)
    _, last = list_checkpoints(copy / "runs" / "pretrain_64" / "checkpoints")
    last.with_suffix(".sha256").unlink()
    return copy


def assert_same(alone: Trainer, losses: list[float], out_dir: Path) -> None:
    assert losses == pytest.approx(metrics(alone), rel=2e-5)
    theirs = torch.load(out_dir / "pretrain_64.pth")
    ours = torch.load(alone.weights_path)
    assert all(torch.allclose(theirs[n].float(), t.float(), rtol=2e-3, atol=1e-4) for n, t in ours.items())


def test_shared_out_or_copied_the_training_is_the_same_and_goes_on_with_any_other_number(
    options, alone, tmp_path
):
    """One process → 4 with copies; 2 that share the model → 1, and → 3 that share it."""
    given = replace(options, max_steps=STEPS, save_interval=10, optimizer="adamw")
    shared = tmp_path / "shared"
    assert_same(alone, train(given, shared, 2, "--parallel=fsdp"), shared)
    folder = shared / "runs" / "pretrain_64" / "checkpoints" / "step_00000020"
    assert len(list(folder.glob("*.distcp"))) == 2
    said = [json.loads(line) for line in (folder.parents[1] / SAMPLES).read_text().splitlines()]
    assert [line["prompt"] for line in said] == BEGINNINGS[:4]
    assert all(line["answer"] for line in said)

    for name, start, processes, how in (
        ("one to four", options.out_dir, 4, "ddp"),
        ("two to three", shared, 3, "fsdp"),
    ):
        out_dir = stopped_half_way(start, tmp_path / name)
        losses = train(given, out_dir, processes, f"--parallel={how}", "--from_resume=1")
        assert_same(alone, losses, out_dir)

    out_dir = stopped_half_way(shared, tmp_path / "two to one")
    assert_same(alone, metrics(run(replace(alone.options, out_dir=out_dir, from_resume=True))), out_dir)


def test_several_processes_are_estimated_as_they_train(options):
    names = ("data_path", "dtype", "compile", *SIZE)
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    command = [
        sys.executable,
        *torchrun(2),
        "-m",
        "minimind",
        "estimate",
        "pretrain",
        *flags,
        "--parallel=fsdp",
    ]
    done = subprocess.run(
        [*command, "--global_batch_size=12"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("it fits") == 1


def test_passes_in_bf16_do_not_share_what_comes_and_goes_with_sharded_weights(options, tmp_path):
    given = replace(options, max_steps=8, optimizer="adamw", dtype="bfloat16", compile="0")
    alone = run(replace(given, out_dir=tmp_path / "alone", epochs=9, batch_size=4, accumulation_steps=3))
    shared = train(given, tmp_path / "shared", 2, "--parallel=fsdp")
    assert shared == pytest.approx(metrics(alone), rel=2e-3)


def test_what_is_wrong_for_all_processes_is_said_once(tmp_path):
    data = write_jsonl(tmp_path / "bad.jsonl", [{"text": "good"}, {"txt": "bad"}])
    done = launch(2, f"--data_path={data}", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert f"{data}:2" in done.stderr


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launcher_that_names_no_number_is_a_sentence(monkeypatch, name):
    monkeypatch.setenv(name, "first")
    with pytest.raises(UserError, match=f"the environment variable {name} is 'first'"):
        setup("cpu", "float32")
