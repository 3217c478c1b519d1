"""Loops in Python that Numba compiles: for what takes longer in calls of NumPy or PyTorch than in itself.

The first call on a machine compiles; the code is kept beside the file of the loop or in the user's cache.
While a loop runs, other threads have Python to themselves.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


class CodeCache(FunctionCache):
    """Numba's, but code is old when any file beside the loop's has changed: it may hold loops of those."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = stamp_of(Path(function.__code__.co_filename).parent)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (pickle.UnpicklingError, EOFError):  # cut short, as by a loss of power
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # such as a full disk: the code is there, the next process compiles again
            super().save_overload(sig, data)


@cache
def stamp_of(folder: Path) -> list[tuple[str, int, int]]:
    """Which files of Python a folder has, when they were changed, and their sizes."""
    states = {path.name: path.stat() for path in folder.glob("*.py")}
    return sorted((name, state.st_mtime_ns, state.st_size) for name, state in states.items())


def compiled(**options: Any) -> Callable[[Callable], Callable[..., Any]]:
    """Compile a function when it is first called, and keep the code for other processes where that can be."""

    def decorate(function: Callable) -> Callable[..., Any]:
        # Python's error for a division by zero would keep the loop out of vector instructions.
        dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
        with suppress(RuntimeError):  # neither this folder nor the user's cache may be written
            dispatcher._cache = CodeCache(function)
        return dispatcher

    return decorate


# For loops so short that handing over their arrays, as seven numbers each, would take longer.
inlined = compiled(inline="always")
