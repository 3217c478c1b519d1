"""Where a run's numbers go besides `metrics.jsonl`: Weights & Biases, SwanLab, TensorBoard.

No training is worth stopping for a log. A library without login or network writes to the run's folder, one
that fails is dropped with a word, and one that is not asked for is not imported.

A resumed run goes on under the same id, and each logger is given the numbers of the steps before once more:
what a library had not yet written went with the killed process, and of two offline folders of a run the
service keeps the one that is sent last. So the newest folder always holds the whole run.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from minimind.errors import UserError

INIT_SECONDS = 30  # to reach the service, before a run goes offline
FINISH_SECONDS = 60  # to send the last numbers, before they are left in the folder


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told about a run."""

    id: str  # stays the same when the run is resumed
    name: str
    project: str
    folder: Path
    settings: dict[str, Any]


class Logger(Protocol):
    """One library. Constructed with (run, mode); whatever it raises is dealt with by `Loggers`."""

    modes: ClassVar[tuple[str, ...]]  # to try one after the other

    def __init__(self, run: RunInfo, mode: str) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class Wandb:
    modes: ClassVar[tuple[str, ...]] = ("online", "offline")

    def __init__(self, run: RunInfo, mode: str) -> None:
        import wandb

        if mode == "offline":
            wandb.teardown()  # it takes the id of the attempt before as in use
        # `wandb.init` would ask for a login at the terminal. Other modes the user has set (WANDB_MODE) stay.
        elif wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("there is no login here; `wandb login` makes one")
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.settings,
            dir=run.folder,
            mode="offline" if mode == "offline" else None,
            settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        if step >= self.run.starting_step:  # the service has those before
            self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


class SwanLab:
    modes: ClassVar[tuple[str, ...]] = ("online", "offline")

    def __init__(self, run: RunInfo, mode: str) -> None:
        import swanlab

        on_interrupt = signal.getsignal(signal.SIGINT)
        self.run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.settings,
            log_dir=str(run.folder / "swanlab"),
            mode="offline" if mode == "offline" else None,
            settings=swanlab.Settings(interactive=False),  # never ask at the terminal
        )
        signal.signal(signal.SIGINT, on_interrupt)  # swanlab takes Ctrl-C, which is to save the training

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)  # leaves out by itself what the service has

    def finish(self) -> None:
        with time_limit(FINISH_SECONDS):  # without a network it would try for ever
            self.run.finish()


class TensorBoard:
    modes: ClassVar[tuple[str, ...]] = ("local",)

    def __init__(self, run: RunInfo, mode: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What is there belongs to another run, or comes again.
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=0)
        settings = json.dumps(run.settings, indent=2, ensure_ascii=False)
        self.writer.add_text("settings", f"```json\n{settings}\n```", 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


LOGGERS: dict[str, type[Logger]] = {"wandb": Wandb, "swanlab": SwanLab, "tensorboard": TensorBoard}


def check_installed(names: Sequence[str]) -> None:
    """Raises: UserError naming the first package that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"--logger {name} needs a package that is not installed: pip install {name}")


class Loggers:
    """The loggers of a run, each for as long as it works."""

    def __init__(self, names: Sequence[str], run: RunInfo, say: Callable[[str], None]) -> None:
        self.say = say
        started = ((name, self.start(name, run)) for name in names)
        self.working = {name: logger for name, logger in started if logger}

    def start(self, name: str, run: RunInfo) -> Logger | None:
        kind = LOGGERS[name]
        for mode in kind.modes:
            try:
                return kind(run, mode)
            except Exception as error:
                then = (
                    "the training goes on without it"
                    if mode == kind.modes[-1]
                    else f"logging to {run.folder}; `{name} sync` sends it later"
                )
                self.say(f"{name}: {reason(error)}; {then}")
        return None

    def log(self, step: int, values: dict[str, float]) -> None:
        self.each(lambda logger: logger.log(step, values))

    def finish(self) -> None:
        self.each(lambda logger: logger.finish())

    def each(self, action: Callable[[Logger], None]) -> None:
        for name, logger in list(self.working.items()):
            try:
                action(logger)
            except Exception as error:
                self.say(f"{name}: {reason(error)}; the training goes on without it")
                del self.working[name]


def reason(error: Exception) -> str:
    """The first line of what `error` says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
