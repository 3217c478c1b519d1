"""A process that hangs is named in time, and the run ended, whatever made it hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind.paths import ROOT
from minimind.train.watchdog import EXIT_CODE, Report, Seen, behind, describe

from .conftest import SIZE

TIMEOUT = 6.0
# What a data source that hangs looks like: the third step's rows never come in process 1.
HANGING_DATA = """
import os, time
from minimind.data.batches import PackedDataset
from minimind.errors import run_cli
from minimind.stages.pretrain import main

batch = PackedDataset.batch

def hanging(self, epoch, row_start, *arguments, **named):
    if os.environ["RANK"] == "1" and row_start >= 16:
        time.sleep(1e6)
    return batch(self, epoch, row_start, *arguments, **named)

PackedDataset.batch = hanging
run_cli(main)
"""


@pytest.fixture
def launch(options, tmp_path):
    """Start two processes that train for longer than any test; kills what is left of them."""
    started = []

    def start(script: Path) -> subprocess.Popen:
        names = ("data_path", "out_dir", "dtype", "compile", *SIZE)
        flags = [f"--{name}={getattr(options, name)}" for name in names]
        more = ["--epochs=100000", "--batch_size=8", "--accumulation_steps=1", f"--hang_timeout={TIMEOUT}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), *flags, *more],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=(tmp_path / "stderr").open("wb"),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in (*workers(process.pid), process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_until(condition, seconds: float) -> float:
    """Returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "too late"
        time.sleep(0.1)
    return time.monotonic() - began


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started, by rank."""
    pids = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in pids}
    return sorted(pid for pid, variables in environments.items() if "LOCAL_RANK=" in " ".join(variables))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_named(launch, options, tmp_path, rank):
    run = launch(ROOT / "trainer" / "train_pretrain.py")
    metrics = options.out_dir / "runs" / "pretrain_64" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, 90)
    time.sleep(1)  # that it has published something since
    pid = workers(run.pid)[rank]
    os.kill(pid, signal.SIGSTOP)
    stderr = tmp_path / "stderr"
    seconds = wait_until(lambda: "--hang_timeout" in stderr.read_text(), TIMEOUT + 20)
    assert seconds >= TIMEOUT - 1
    message = re.search(r"error: no process has moved on for 6 s.*", stderr.read_text())[0]
    assert re.search(
        rf"process {rank} \(host \S+, pid {pid}\) no longer answers, last seen at step \d+", message
    )
    assert f"process {1 - rank}" not in message
    assert run.wait(timeout=20) != 0


def test_a_process_whose_data_never_come_is_named_and_shows_where_it_is(launch, tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING_DATA)
    run = launch(script)
    assert run.wait(timeout=90) != 0
    stderr = (tmp_path / "stderr").read_text()
    message = re.search(r"error: no process has moved on for 6 s.*", stderr)[0]
    assert re.search(r"process 1 \(host \S+, pid \d+\) hangs at step 2, waiting for its rows, since", message)
    assert "process 0" not in message
    assert "where process 1 stands" in stderr
    assert "in hanging" in stderr  # the very function
    assert "where process 0 stands" not in stderr
    assert f"exitcode: {EXIT_CODE}" in stderr


def test_the_one_behind_is_named():
    reports = [Report("host", 1, 5, "saving", beats=beats) for beats in (9, 8, 9, 8)]
    assert behind(reports) == [1, 3]
    seen = Seen(Report("host", 7, 5, "saving", idle=60.0), at=100.0)
    text = "process 2 (host host, pid 7) hangs at step 5, saving, since 70 s"
    assert describe(2, seen, now=110.0, silent=False) == text
    assert json.loads(json.dumps(vars(seen.report)))["beats"] == 0
