"""Ctrl-C, SIGTERM (a machine that is taken away) and SIGHUP (a terminal that is closed) as a wish to save and
stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupted(Exception):
    """A signal asked the run to stop; raised between two batches, with the weights of the last full step."""


class StopSignals:
    """These signals as a request to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # as it is under `nohup`
            numbers.append(HANGUP)
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == HANGUP:  # writing to a terminal that is gone is an error, and would end the saving
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self.terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        self.received = number
