"""Names the process that a run of several hangs on, instead of hanging with it for ever.

Processes of a run wait for each other several times in a step. When one of them stands still, so do all, and
none can see which was the first. So each counts the places it passes in the loop (`beat`), and a thread of it
publishes that count, every second, in the store where the processes met. Once a process has stood still for
a tenth of `--hang_timeout` its thread begins to read what the others publish; when none of them has moved for
the whole of it, the one behind the others, or the one whose thread has fallen silent too (a stopped process,
a dead machine), is named on stderr, and all end with `EXIT_CODE`. A launcher can start them anew from there.

Nothing is watched before the first step is done. Tokenising a large file, scoring all data for preferences
and compiling the model take as long as they take; until then PyTorch's own time limit has to do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed import DistError, Store

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: starting again may help
STORE_GRACE = 10.0  # seconds beyond the time limit in which a living store has answered for certain


@dataclass
class Report:
    """What a process publishes about itself."""

    host: str
    pid: int
    step: int
    doing: str
    beats: int = 0
    idle: float = 0.0  # seconds since the last beat
    number: int = 0  # of this report: one that stays the same comes from a thread that is silent


@dataclass(frozen=True)
class Seen:
    """A report, and when it was first read."""

    report: Report
    at: float

    def idle(self, now: float) -> float:
        """Seconds since the process's last beat; of a silent one, at least so many."""
        return self.report.idle + now - self.at

    def place(self, now: float) -> str:
        return f"at step {self.report.step}, {self.report.doing}, since {self.idle(now):.0f} s"


class Watchdog:
    """Watches while it is entered.

    Args:
        store: a connection of its own: one call that waits would hold up all others of a connection.
        timeout: seconds without a beat of any process until the run is ended.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.interval = min(1.0, timeout / 10)
        self.own = Report(socket.gethostname(), os.getpid(), 0, "about to begin")
        self.first_step: int | None = None
        self.beat_at = self.answered_at = time.monotonic()
        self.seen: list[Seen] = []
        self.closed = threading.Event()

    @property
    def idle(self) -> float:
        """Seconds that this process stands still, once its first step is done."""
        return 0.0 if self.own.step == self.first_step else time.monotonic() - self.beat_at

    def beat(self, doing: str, step: int | None = None) -> None:
        """This process has come to a place that all processes come to, equally often."""
        if step is not None:
            self.first_step = self.first_step or step
            self.own.step = step
        self.own.doing = doing
        self.own.beats += 1
        self.beat_at = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            for key in ("verdict", "judges"):  # of the processes before a restart
                self.store.delete_key(key)
        self.publish()  # before the first step, so that there is something to read of every process after it
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self.watch, self.watch_store)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for thread in self.threads:  # one still inside the store would abort the interpreter's end
            thread.join(timeout=STORE_GRACE)

    # ---- In threads ----

    def watch(self) -> None:
        with contextlib.suppress(DistError):  # the store is gone; `watch_store` sees what follows from that
            while not self.closed.wait(self.interval):
                self.publish()
                if self.idle < self.timeout / 10:
                    self.seen = []
                    continue
                if self.store.check(["verdict"]):
                    self.leave(json.loads(self.store.get("verdict")))
                self.read()
                # A process leaves the word to those of lower rank, unless they are silent too.
                now, turn = time.monotonic(), min(self.rank, 5) * self.interval
                if self.idle >= self.timeout + turn:
                    self.judge(now)

    def publish(self) -> None:
        self.own.idle = self.idle
        self.own.number += 1
        self.store.set(f"report/{self.rank}", json.dumps(asdict(self.own)))
        self.store.check([f"report/{self.rank}"])  # `set` alone does not wait for an answer
        self.answered_at = time.monotonic()

    def read(self) -> None:
        values = self.store.multi_get([f"report/{rank}" for rank in range(self.world_size)])
        now = time.monotonic()
        before: list[Seen] | list[None] = self.seen or [None] * self.world_size
        reports = [Report(**json.loads(value)) for value in values]
        self.seen = [
            old if old and old.report == report else Seen(report, now)
            for old, report in zip(before, reports, strict=True)
        ]

    def judge(self, now: float) -> None:
        """When nobody moves: name those that hang and end the run; the first that would do so does."""
        silent = [rank for rank, seen in enumerate(self.seen) if now - seen.at > self.timeout / 2]
        alive = [seen for rank, seen in enumerate(self.seen) if rank not in silent]
        if any(seen.idle(now) < self.timeout for seen in alive) or self.store.add("judges", 1) > 1:
            return
        named = silent or behind([seen.report for seen in self.seen])
        if len(named) == self.world_size:
            where = f"all {self.world_size} processes hang {self.seen[0].place(now)}"
        else:
            where = "; ".join(describe(rank, self.seen[rank], now, rank in silent) for rank in named)
        say(f"no process has moved on for {self.timeout:g} s (--hang_timeout): {where}")
        self.store.set("verdict", json.dumps(named))
        for report in (self.seen[rank].report for rank in silent):
            if report.host == self.own.host and is_sibling(report.pid):
                # A stopped process is deaf to the launcher, which would wait half a minute for its end.
                os.kill(report.pid, signal.SIGKILL)
        self.leave(named)

    def leave(self, named: Sequence[int]) -> None:
        if self.rank in named:
            say(f"where process {self.rank} stands:")
            faulthandler.dump_traceback()
        # A launcher kills the others when the first ends; let those that hang show where they are.
        time.sleep(2 * self.interval if self.rank not in named else 0)
        os._exit(EXIT_CODE)

    def watch_store(self) -> None:
        """The store dies with the machine it is on, and may then leave the other thread waiting for ever."""
        while not self.closed.wait(self.interval):
            silence = time.monotonic() - self.answered_at
            if min(silence, self.idle) > self.timeout + STORE_GRACE:
                say(
                    f"the meeting point {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} has "
                    f"not answered for {silence:.0f} s: its machine or process is stopped or gone"
                )
                os._exit(EXIT_CODE)


def behind(reports: Sequence[Report]) -> list[int]:
    """The processes that have come least far; all, where they stand at the same place."""
    least = min(report.beats for report in reports)
    return [rank for rank, report in enumerate(reports) if report.beats == least]


def describe(rank: int, seen: Seen, now: float, silent: bool) -> str:
    what = "no longer answers, last seen" if silent else "hangs"
    return f"process {rank} (host {seen.report.host}, pid {seen.report.pid}) {what} {seen.place(now)}"


def is_sibling(pid: int) -> bool:
    """Whether the launcher of this process started that one too; a host's name alone proves nothing."""
    try:
        return f"PPid:\t{os.getppid()}\n" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
