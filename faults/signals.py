"""Processes killed and told to stop at any moment; and a long run without any disturbance."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from faults.runs import Lab, Process, Run, difference, same_bits

KILLS = 52  # about half of them aimed at a checkpoint that is being written
SAVED_WITHIN = 10  # seconds from SIGTERM to the end, with everything saved


def kill(lab: Lab) -> dict[str, Any]:
    """SIGKILL over and over; the run is started again until it is done."""
    run = lab.run("kill", steps=1500)
    inside = 0
    for number in range(KILLS):
        left = run.unfinished()  # by the kill before
        process = run.start("--from_resume=1")
        assert process.until_training(), f"it ended by itself: {process.said()[-1000:]}"
        delay = lab.rng.uniform(0, 0.6)
        if number % 2:
            time.sleep(delay)
        else:
            saved = run.checkpoints
            process.until(lambda saved=saved: run.checkpoints != saved)  # so that each start gets on
            stop_inside_a_write(process, delay / 100)
        assert process.running(), f"it was done after {number} kills"
        process.kill()
        inside += bool(run.unfinished() - left)
    run.start("--from_resume=1").must_succeed()
    assert not run.unfinished(), f"left behind: {run.unfinished()}"
    assert inside >= KILLS // 3, f"only {inside} kills fell inside a write"
    assert same_bits(run, lab.reference(run)), "other weights than the undisturbed run's"
    return {"kills": KILLS, "inside a write": inside, "weights": "the same bits"}


def stop_inside_a_write(process: Process, delay: float) -> None:
    """Bring a training to a halt while it writes a checkpoint, up to `delay` seconds after the beginning."""
    left = process.run.unfinished()

    def inside() -> bool:
        if not process.run.unfinished() - left:
            return False
        time.sleep(delay)
        os.kill(process.pid, signal.SIGSTOP)
        if process.run.unfinished() - left:
            return True
        os.kill(process.pid, signal.SIGCONT)  # it was done already
        return False

    process.until(inside)


def stop(lab: Lab) -> dict[str, Any]:
    """SIGTERM at random moments, inside a write and while evaluating."""
    run = lab.run("stop", steps=300, eval_path=lab.data, eval_interval=50)
    slowest = 0.0
    moments = {
        "random": lambda process: time.sleep(lab.rng.uniform(0, 1.0)),
        "inside a write": go_on_from_inside_a_write,
        "while evaluating": lambda process: process.until(lambda: is_evaluating(run)),
    }
    order = ["random"] * 3 + ["inside a write", "while evaluating"] * 2
    for moment in order:
        process = run.start("--from_resume=1")
        assert process.until_training(), f"it ended by itself: {process.said()[-1000:]}"
        moments[moment](process)
        slowest = max(slowest, terminate(process, 128 + signal.SIGTERM))
    run.start("--from_resume=1").must_succeed()
    assert same_bits(run, lab.reference(run)), "other weights than the undisturbed run's"
    return {"signals": len(order), "slowest end (s)": round(slowest, 1), "weights": "the same bits"}


def go_on_from_inside_a_write(process: Process) -> None:
    stop_inside_a_write(process, 0.0)
    os.kill(process.pid, signal.SIGCONT)


def is_evaluating(run: Run) -> bool:
    logged = run.metrics()
    return bool(logged) and logged[-1]["step"] % 50 == 0 and "loss" in logged[-1]


def terminate(process: Process, expected: int | None = None) -> float:
    """Send SIGTERM; returns the seconds until the end."""
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code = process.end()
    seconds = time.monotonic() - began
    assert code == expected or (expected is None and code != 0), f"exit code {code}"
    assert "everything is saved" in process.said(), process.said()[-1000:]
    assert seconds <= SAVED_WITHIN, f"it took {seconds:.1f} s to end"
    return seconds


def stop_two(lab: Lab) -> dict[str, Any]:
    """SIGTERM to the launcher of two processes."""
    run = lab.run("stop_two", steps=60, processes=2, save_interval=10)
    process = run.start()
    assert process.until_training(5)
    seconds = terminate(process)
    run.start("--from_resume=1").must_succeed()
    apart = difference(run, lab.reference(run))
    assert apart <= 1e-5, f"weights are {apart:.1e} apart"
    return {"end (s)": round(seconds, 1), "weights apart": apart}


def soak(lab: Lab) -> dict[str, Any]:
    """A long run with all that happens regularly in one; its memory must not grow."""
    run = lab.run("soak", steps=2100, save_interval=50, eval_interval=50, log_interval=10)
    process = run.start()
    series: dict[int, float] = {}
    for step in range(100, 2001, 100):
        assert process.until(lambda step=step: run.step() >= step), process.said()[-1000:]
        series[step] = round(process.resident_memory() / 1e6, 1)
    process.must_succeed()
    growth = series[2000] / series[500] - 1
    assert abs(growth) <= 0.02, f"resident memory grew by {growth:.1%}: {series}"
    return {"growth from step 500 to 2000": f"{growth:+.2%}", "resident memory (MB)": series}
