"""Rivals measured in turn, so that a noisy machine disturbs all alike, each in a process of its own, so that
the settings of one can neither help nor harm another; and where the results are written."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minimind.environment import environment

Work = Callable[[], float]  # does a piece of work and returns how much that was, in tokens for instance


def in_own_process(prepare: Callable[..., Work], *arguments: object) -> Work:
    """The work that `prepare(*arguments)` returns, but done in a process that is started for it.

    What `prepare` or the work raises ends that process, and the next call of the work with EOFError.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(prepare, arguments, there), daemon=True).start()
    there.close()  # else a process that has died would be waited for

    def work() -> float:
        here.send("work")
        return here.recv()

    return work


def serve(prepare: Callable[..., Work], arguments: tuple[object, ...], requests: Connection) -> None:
    work = prepare(*arguments)
    with contextlib.suppress(EOFError):  # the other side is done
        while requests.recv():
            requests.send(work())


def rates_in_turn(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Amount of work per second of each, in each round; one round before them is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            amount = work()
            rates[name].append(amount / (time.perf_counter() - began))
            print(f"round {number}: {name} {rates[name][-1]:,.0f} a second", flush=True)
    return {name: values[1:] for name, values in rates.items()}


def median_and_spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def write_results(path: Path, command: str, results: dict[str, Any]) -> None:
    """The command, the machine and what was measured, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command, "machine": environment()} | results, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
