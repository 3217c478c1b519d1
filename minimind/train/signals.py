"""Ctrl-C and SIGTERM (a machine that is taken away) as a wish to save and stop."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop; raised between two batches, with the weights of the last full step."""


class StopSignals:
    """Ctrl-C and SIGTERM as a request to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self.previous = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
