"""What ends a training from outside: it saves first."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from minimind.train.checkpoint import list_checkpoints

from .test_loop import command


def wait_for_steps(out_dir: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    metrics_file = out_dir / "runs" / "pretrain_64" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics_file.is_file() and metrics_file.read_text().count("\n") > 3):
        assert time.monotonic() < deadline, "no step in a minute"
        meanwhile()
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


def test_a_reader_that_leaves_and_a_full_disk_under_the_log_cost_nothing(options):
    quick = command(options, "--accumulation_steps=1", "--log_interval=1")
    for more in (["| head -1"], ["> /dev/full"]):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", " ".join([shlex.join(quick), *more])],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert list_checkpoints(options.out_dir / "runs" / "pretrain_64" / "checkpoints")
        (options.out_dir / "pretrain_64.pth").unlink()


@pytest.mark.parametrize("piped", [False, True])
def test_a_terminal_that_is_closed_costs_nothing(options, piped):
    """Nor does a `tee` that ends with it."""
    endless = command(options, "--epochs=100000", "--accumulation_steps=1", "--log_interval=1")
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        endless,
        stdin=inside,
        stdout=subprocess.PIPE if piped else inside,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # to be told of its end
    )
    os.close(inside)
    os.set_blocking(terminal, False)

    def read() -> None:
        """Or the progress bar fills it, and the training waits."""
        with suppress(BlockingIOError):
            os.read(terminal, 65536)

    wait_for_steps(options.out_dir, read)
    os.close(terminal)
    if process.stdout:
        process.stdout.close()
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    assert list_checkpoints(options.out_dir / "runs" / "pretrain_64" / "checkpoints")
    assert (options.out_dir / "pretrain_64.pth").is_file()
