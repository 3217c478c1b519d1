"""Run a part of the benchmark in a process and a time of its own: its failure is a result, not the end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_own_process(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, or {"error": …}: a fault, more than `seconds`, or the death of the process."""
    context = multiprocessing.get_context("spawn")  # a fork would share a GPU's context
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(there, function, arguments))
    process.start()
    there.close()  # so that the end of the process is seen here
    try:
        if not here.poll(max(seconds, 0)):
            return {"error": f"took more than {seconds:.0f} s"}
        return here.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def serve(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    connection.send(caught(function, *arguments))


def caught(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns without what it prints, or the last lines of its fault."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = "\n".join(str(error).strip().splitlines()[:4])[:500]
            return {"error": f"{type(error).__name__} ({place.name}:{place.lineno}): {text}"}
