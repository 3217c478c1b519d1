"""A call in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_own_thread(call: Callable[[], Result]) -> Future[Result]:
    """What `call` returns or raises, once it does; the process may end before."""
    answer: Future[Result] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except Exception as error:  # handed on, as if there were no thread
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer
