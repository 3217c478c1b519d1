"""One of the two processes that share a training dies or hangs; the launcher starts them again."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

from faults.runs import Lab, Process, difference

RESTARTS = ("--max_restarts=3",)
HANG_TIMEOUT = 8.0


def worker_killed(lab: Lab) -> dict[str, Any]:
    """First one process is killed, and after the new start the other."""
    run = lab.run("worker", steps=400, processes=2, save_interval=10)
    process = run.start(launcher=RESTARTS)
    assert process.until_training(25)
    resumed = []
    for rank in (1, 0):
        kill_worker(process, rank)
        resumed.append(wait_for_resume(process, len(resumed) + 1))
        process.until(lambda: run.step() >= resumed[-1] + 25)
    process.must_succeed()
    apart = difference(run, lab.reference(run))
    assert apart <= 1e-5, f"weights are {apart:.1e} apart"
    return {"killed ranks": "1, 0", "resumed at steps": resumed, "weights apart": apart}


def kill_worker(process: Process, rank: int) -> None:
    os.kill(process.workers()[rank], signal.SIGKILL)


def wait_for_resume(process: Process, number: int) -> int:
    """The step that the `number`-th new start goes on from."""
    found = lambda: re.findall(r"resumed at step (\d+)", process.said())  # noqa: E731
    assert process.until(lambda: len(found()) >= number), process.said()[-2000:]
    return int(found()[number - 1])


def worker_hangs(lab: Lab) -> dict[str, Any]:
    """One process is stopped. It is named in time, and the training goes on without anybody's help."""
    run = lab.run("watchdog", steps=400, processes=2, save_interval=10)
    process = run.start(launcher=RESTARTS, hang_timeout=HANG_TIMEOUT)
    assert process.until_training(25)
    time.sleep(1)
    pid = process.workers()[1]
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    assert process.until(lambda: "--hang_timeout" in process.said()), process.said()[-2000:]
    seconds = time.monotonic() - began
    named = re.search(r"process (\d) \(host \S+, pid (\d+)\) no longer answers", process.said())
    assert named, process.said()[-2000:]
    assert named.groups() == ("1", str(pid)), f"named process {named[1]}"
    assert seconds <= HANG_TIMEOUT + 5, f"named after {seconds:.1f} s"
    step = wait_for_resume(process, 1)
    process.must_succeed()
    apart = difference(run, lab.reference(run))
    assert apart <= 1e-5, f"weights are {apart:.1e} apart"
    return {"--hang_timeout": HANG_TIMEOUT, "named after (s)": round(seconds, 1), "resumed at step": step}
