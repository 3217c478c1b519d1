"""Checkpoints: everything a run needs to go on exactly where it was.

    runs/{name}/checkpoints/step_00000500/state.pt     plain values, and all tensors of a model in one process
    runs/{name}/checkpoints/step_00000500/*.distcp     the tensors of a model shared out over processes
    runs/{name}/checkpoints/step_00000500.sha256       written last: a checkpoint without it does not exist

Either kind is read by any number of processes, whether they share the model out or not. The newest `keep` are
kept. A damaged one is passed over for the one before it.

`state.pt` is read as data only. PyTorch's reader of `*.distcp` unpickles their index, which could run code:
go on from sharded checkpoints of your own, not from a stranger's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from minimind.errors import UserError
from minimind.files import atomic_write, free_space
from minimind.train.engine import Engine
from minimind.train.parallel import Parallel

STATE = "state.pt"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Any],
    parallel: Parallel,
    keep: int = 2,
) -> None:
    """Write the checkpoint of `step`: plain values and an engine's tensors; all processes call this.

    Drops all but the newest `keep`. Raises: UserError when the disk is full; those from before stay.
    """
    path = folder / f"step_{step:08d}"
    if parallel.is_main:
        path.with_suffix(".sha256").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    parallel.barrier()
    if parallel.sharded:
        try:
            dcp.save(tensors, checkpoint_id=path)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise UserError(f"could not write {path}{free_space(folder)}: {error}") from error
    if parallel.is_main:
        whole = state if parallel.sharded else state | tensors
        atomic_write(path / STATE, lambda file: torch.save(whole, file))
        checksums = "".join(f"{file_checksum(file)}  {file.name}\n" for file in sorted(path.iterdir()))
        atomic_write(path.with_suffix(".sha256"), lambda file: file.write(checksums.encode()))
        finished = list_checkpoints(folder)
        for old in finished[:-keep]:
            old.with_suffix(".sha256").unlink()
        for old in folder.glob("step_*/"):  # with those that a killed run has left unfinished
            if old not in finished[-keep:]:
                shutil.rmtree(old)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none.

    Args: say: told, in a sentence, of each damaged checkpoint that was passed over.
    Raises: UserError when there are checkpoints and all are damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        if is_whole(path):
            return path
        say(f"checkpoint {path} is damaged (its checksum differs); using the one before it")
    if checkpoints:
        raise UserError(f"all checkpoints in {folder} are damaged; start anew with --from_resume 0")
    return None


def is_whole(path: Path) -> bool:
    lines = path.with_suffix(".sha256").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
    files = [path / name for name in wanted]
    return bool(files) and all(f.is_file() and file_checksum(f) == wanted[f.name] for f in files)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`; with the tensors, unless the model was shared out."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def load_tensors(path: Path, state: dict[str, Any], engine: Engine) -> None:
    """Fill an engine, sharded or not, from the checkpoint at `path`.

    Args: state: `load_state` of it.
    """
    if "model" in state:
        engine.load_state_dict(state, whole=True)
    else:
        tensors = engine.state_dict()
        dcp.load(tensors, checkpoint_id=path)
        engine.load_state_dict(tensors, whole=False)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(
        sums.with_suffix("") for sums in folder.glob("step_*.sha256") if sums.with_suffix("").is_dir()
    )


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_state() -> dict[str, Any]:
    """The state of PyTorch's random generators, the only ones a run draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
