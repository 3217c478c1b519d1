"""Rivals measured in turn, so that a noisy machine disturbs all alike, each in a process of its own, so that
the settings of one can neither help nor harm another; and where the results are written."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import readme
from minimind.environment import environment
from minimind.errors import UserError
from minimind.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Work = Callable[..., Any]  # does a piece of work and returns how much that was, in tokens for instance


def in_own_process(prepare: Callable[..., Work], *arguments: object) -> Work:
    """The work that `prepare(*arguments)` returns, but done in a process that is started for it.

    A UserError of `prepare` or of the work is raised here, by the next call of the work. Anything else ends
    that process, and the next call with EOFError. The process ends when the work is forgotten.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(prepare, arguments, there), daemon=True).start()
    there.close()  # else a process that has died would be waited for

    def work(*request: object) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and has perhaps said why
            here.send(request)
        answer = here.recv()
        if isinstance(answer, UserError):
            raise answer
        return answer

    return work


def serve(prepare: Callable[..., Work], arguments: tuple[object, ...], requests: Connection) -> None:
    try:
        work = prepare(*arguments)
        with contextlib.suppress(EOFError):  # the other side is done
            while True:
                requests.send(work(*requests.recv()))
    except UserError as error:
        requests.send(error)


def once_in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What `function(*arguments)` returns or raises in a process that is started for this call alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def rates_in_turn(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Amount of work per second of each, in each round; one round before them is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            amount = work()
            rates[name].append(amount / (time.perf_counter() - began))
            print(f"round {number}: {name} {rates[name][-1]:,.1f} a second", flush=True)
    return {name: values[1:] for name, values in rates.items()}


def note(path: Path, **facts: float) -> None:
    """Add to what a process tells beside the amount of its work, for the one that started it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def notes(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_results(path: Path, options: DataclassInstance, results: dict[str, Any]) -> None:
    """The command, the machine and what was measured, as JSON; among the results, for the READMEs too."""
    told = {"command": command_line(options), "machine": environment()}
    write_text(path, json.dumps(told | results, indent=2, ensure_ascii=False) + "\n")
    if path.resolve().parent == readme.RESULTS:
        readme.refresh()


def command_line(options: DataclassInstance) -> str:
    """The command that was given these options, without the paths of this machine."""
    module = sys.modules[type(options).__module__].__spec__.name  # which `__main__` has, too
    words = [f"python -m {module.removesuffix('.__main__')}"]
    for item in fields(options):
        value = getattr(options, item.name)
        name = "" if item.metadata["positional"] else f"--{item.name} "
        if isinstance(value, Path):
            if item.name != "json" and value != item.default:
                words.append(f"{name}{item.name.upper()}")
        elif isinstance(value, list | tuple):
            words.append(f"{name}{' '.join(map(str, value))}")
        elif value is not None and value is not False:
            words.append(f"{name}{1 if value is True else value}")
    return " ".join(words)
