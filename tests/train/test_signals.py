"""What ends a training from outside: it saves first."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minimind.train.checkpoint import list_checkpoints

from .test_loop import command


def wait_for_steps(out_dir: Path) -> None:
    metrics_file = out_dir / "runs" / "pretrain_64" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics_file.is_file() and metrics_file.read_text().count("\n") > 3):
        assert time.monotonic() < deadline, "no step in a minute"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop_the_command(options, tmp_path, number):
    endless = command(options, "--epochs=100000", "--accumulation_steps=1")
    process = subprocess.Popen(endless, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_for_steps(options.out_dir)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "--from_resume 1 goes on from here" in out
    assert list_checkpoints(options.out_dir / "runs" / "pretrain_64" / "checkpoints")
    assert (options.out_dir / "pretrain_64.pth").is_file()


def test_a_terminal_that_is_closed_costs_nothing(options):
    pid, terminal = pty.fork()
    if pid == 0:
        endless = command(options, "--epochs=100000", "--accumulation_steps=1")
        os.execv(endless[0], endless)
    wait_for_steps(options.out_dir)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert list_checkpoints(options.out_dir / "runs" / "pretrain_64" / "checkpoints")
    assert (options.out_dir / "pretrain_64.pth").is_file()
