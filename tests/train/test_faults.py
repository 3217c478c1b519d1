"""A few of the faults of `make faults`, in seconds: processes killed at any moment, and what they leave."""

from __future__ import annotations

import os
import signal
import time

import pytest

from faults.runs import Lab, difference, same_bits


@pytest.fixture
def lab(texts, tmp_path) -> Lab:
    return Lab(tmp_path, texts, seed=0)


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(lab):
    run = lab.run("killed", steps=60)
    for wait in (0.0, 0.05, 0.2):
        process = run.start("--from_resume=1")
        assert process.until_training(3)
        time.sleep(wait)
        process.kill()
    run.start("--from_resume=1").must_succeed()
    assert same_bits(run, lab.reference(run))
    assert not run.unfinished()


def test_a_launcher_starts_killed_processes_again_and_they_go_on(lab):
    run = lab.run("worker", steps=40, processes=2)
    process = run.start(launcher=("--max_restarts=1",))
    assert process.until_training(8)
    os.kill(process.workers()[1], signal.SIGKILL)
    process.must_succeed()
    assert "resumed at step" in process.said()
    assert difference(run, lab.reference(run)) <= 1e-5
