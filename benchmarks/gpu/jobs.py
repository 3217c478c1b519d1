"""Run a part of the benchmark in a process and a time of its own: its failure is a result, not the end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

parent: Connection | None = None  # of this process, where it is one of those


class OwnProcess:
    """A call of `function` in a process of its own, which goes on from each `wait_for_turn` when asked to."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share a GPU's context
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, function, arguments))
        self.process.start()
        there.close()  # so that the end of the process is seen here
        self.results: list[Any] = []

    def ready(self, seconds: float) -> None:
        """Wait until it waits for its turn, or has ended."""
        if not self.results:
            self.results += self.next_message(seconds)

    def result(self, seconds: float) -> Any:
        """What `function` returns, or {"error": …}: a fault, more than `seconds`, or the process's death."""
        if not self.results:
            with contextlib.suppress(OSError):  # it may have ended
                self.connection.send("your turn")
        while not self.results:
            self.results += self.next_message(seconds)
        self.end()
        return self.results[0]

    def end(self) -> None:
        self.process.kill()
        self.process.join()

    def next_message(self, seconds: float) -> list[Any]:
        """The result, or nothing where it waits for its turn."""
        try:
            if not self.connection.poll(max(seconds, 0)):
                return [{"error": f"took more than {seconds:.0f} s"}]
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return [{"error": f"the process ended with code {self.process.exitcode}"}]


def in_own_process(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, or {"error": …} as in `OwnProcess.result`."""
    return OwnProcess(function, *arguments).result(seconds)


def serve(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    global parent
    parent = connection
    connection.send([caught(function, *arguments)])


def wait_for_turn() -> None:
    """In an `OwnProcess`, wait until its result is asked for."""
    if parent:
        parent.send([])
        parent.recv()


def caught(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns without what it prints, or the last lines of its fault."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = "\n".join(str(error).strip().splitlines()[:4])[:500]
            return {"error": f"{type(error).__name__} ({place.name}:{place.lineno}): {text}"}
