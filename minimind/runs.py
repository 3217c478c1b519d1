"""Where a training run keeps what it says of itself: `runs/{name}/` beside its weights.

A new run takes the place of the one that made the weights, but not before it has saved something itself.
Until then that one's `run.json` and `metrics.jsonl` are kept in `last_saved/`; then all of it is in
`previous/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from minimind.errors import UserError

RUN, LOG = "run.json", "metrics.jsonl"
LAST_SAVED, PREVIOUS = "last_saved", "previous"


def run_folder(weights: Path) -> Path:
    """The folder of the run that made `weights`."""
    return weights.parent / "runs" / weights.stem


def read_run(weights: Path) -> dict[str, Any]:
    """Settings and results of the run that made `weights`; see `read_settings`."""
    folder = run_folder(weights)
    last_saved = folder / LAST_SAVED
    return read_settings(last_saved if last_saved.is_dir() else folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """Those of a run that was begun there; empty where it left none, or where the file is damaged."""
    try:
        run = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return run if isinstance(run, dict) else {}


def alone_in(folder: Path) -> AcquireReturnProxy:
    """Hold a run's folder. Raises: UserError when another process is at work in it."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {folder}; wait for it, or choose another --out_dir"
        ) from None


def keep_last_saved(folder: Path) -> None:
    """Before a new run writes its own: keep what the run with the weights has said."""
    kept = folder / LAST_SAVED
    if kept.exists():  # the run in between has not saved anything
        return
    unfinished = folder / f".{LAST_SAVED}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for path in filter(Path.is_file, (folder / RUN, folder / LOG)):
        shutil.copy(path, unfinished)
    unfinished.replace(kept)


def bring_back_last_saved(folder: Path) -> None:
    """A new run has ended before it saved anything, and the one before it is to go on."""
    move((folder / LAST_SAVED).glob("*"), folder)
    shutil.rmtree(folder / LAST_SAVED, ignore_errors=True)


def set_aside(folder: Path, results: Sequence[Path]) -> None:
    """Now that a new run saves: the `results` of the one before it, and what it has said, to `previous/`.

    What was there before is given up last, and a run that finds the work of one killed meanwhile ends it.
    """
    unfinished = folder / f".{PREVIOUS}.tmp"
    if not (results or unfinished.exists()):
        return
    unfinished.mkdir(exist_ok=True)
    move((*results, *(folder / LAST_SAVED).glob("*")), unfinished)
    shutil.rmtree(folder / LAST_SAVED, ignore_errors=True)
    shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
    unfinished.replace(folder / PREVIOUS)


def move(paths: Iterable[Path], folder: Path) -> None:
    for path in list(filter(Path.exists, paths)):
        path.replace(folder / path.name)
