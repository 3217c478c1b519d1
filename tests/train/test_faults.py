"""Two of the faults of `make faults`, in seconds: processes killed at any moment, and what they leave."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from faults.runs import Lab
from minimind.train.loop import Trainer

from .conftest import run, weights

RATE = 3e-3


@pytest.fixture
def lab(texts, tmp_path) -> Lab:
    return Lab(tmp_path, texts, seed=0)


def undisturbed(options, steps: int) -> Trainer:
    given = replace(options, learning_rate=RATE, max_steps=steps, save_interval=steps, epochs=1000)
    return run(replace(given, batch_size=4, global_batch_size=8, optimizer="adamw"))


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(lab, options):
    killed = lab.run("killed", steps=40, learning_rate=RATE, optimizer="adamw")
    for wait in (0.0, 0.05):
        process = killed.start("--from_resume=1")
        assert process.until_training(3)
        time.sleep(wait)
        process.kill()
    killed.start("--from_resume=1").must_succeed()
    found, expected = killed.tensors(), weights(undisturbed(options, 40))
    assert all(torch.equal(found[f"/model/{name}"], tensor) for name, tensor in expected.items())
    assert not killed.unfinished()


def test_a_launcher_starts_killed_processes_again_and_they_go_on(lab, options):
    shared = lab.run("worker", steps=40, processes=2, learning_rate=RATE)
    process = shared.start(launcher=("--max_restarts=1",))
    assert process.until_training(8)
    os.kill(process.workers()[1], signal.SIGKILL)
    process.must_succeed()
    assert "resumed at step" in process.said()
    found, expected = shared.tensors(), weights(undisturbed(options, 40))
    assert all(
        torch.allclose(found[f"/model/{name}"], tensor, rtol=1e-3, atol=1e-5)
        for name, tensor in expected.items()
    )
