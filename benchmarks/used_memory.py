"""The most memory that this process and those it has started use together."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.1  # seconds


def with_peak_memory(work: Callable[[], T], interval: float = INTERVAL) -> tuple[T, int]:
    """What `work` returns, and the most bytes in use meanwhile, looked at every `interval` seconds."""
    peak, done = used_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, used_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(peak, used_bytes())


def used_bytes() -> int:
    """Of this process and its children; a page that several share is counted once in all."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return sum(proportional_bytes(process) for process in [str(os.getpid()), *children])


def proportional_bytes(process: str) -> int:
    """Linux's PSS: each page divided by the number of processes that have it."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    found = re.search(r"^Pss:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
