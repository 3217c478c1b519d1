"""Ctrl-C, SIGTERM (a machine that is taken away) and SIGHUP (a terminal that is closed) as a wish to save and
stop."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from minimind.errors import discard_output


class Interrupted(Exception):
    """A signal asked the run to stop; raised between two batches, with the weights of the last full step."""


class StopSignals:
    """These signals as a request to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under `nohup`
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            stop_speaking()
        self.received = number


@contextmanager
def output_may_break() -> Iterator[None]:
    """Around what a training says: the reader of it may have gone, or the disk with the log be full."""
    try:
        yield
    except OSError:
        discard_output()


def stop_speaking() -> None:
    """Let what is said go nowhere, unless it goes to a file.

    To write to a terminal that is gone, or to the `tee` that went with it, is an error before the saving.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # there may be none
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
