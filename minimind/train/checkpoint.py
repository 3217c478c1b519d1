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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minimind.errors import UserError
from minimind.files import atomic_write, free_space, write_text
from minimind.train.engine import Engine
from minimind.train.parallel import Parallel

STATE = "state.pt"


class CheckpointWriter:
    """Writes the checkpoints of a run beside its training, one after the other; all processes have one.

    `save` copies the values and returns; a thread brings them to the disk. So the training stands still for
    the copy alone, at the price of the memory that the copy takes.
    """

    def __init__(self, folder: Path, parallel: Parallel, keep: int) -> None:
        self.folder, self.parallel, self.keep = folder, parallel, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        tensors: dict[str, Any],
        then: Callable[[dict[str, Any]], None],
    ) -> None:
        """Begin the checkpoint of `step` when the one before it is done; drops all but the newest `keep`.

        Args:
            state: plain values.
            tensors: an engine's.
            then: called by the thread of the main process, with the copy of an unsharded engine's tensors.
        Raises: UserError when the one before could not be written; nothing is then begun.
        """
        self.wait()
        path = self.folder / f"step_{step:08d}"
        if self.parallel.is_main:
            path.with_suffix(".sha256").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        if self.parallel.sharded:
            self.parallel.barrier()
            shards = dcp.async_save(tensors, checkpoint_id=path, process_group=self.parallel.cpu_group)
            assert isinstance(shards, Future)  # an AsyncSaveResponse is for those who ask to stage
            self.writing = self.thread.submit(self.write, path, state, shards)
        elif self.parallel.is_main:
            whole = state | tree_map_only(torch.Tensor, on_cpu, tensors)
            self.writing = self.thread.submit(self.write, path, whole, None, lambda: then(whole))

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises: UserError when it could not be written."""
        writing, self.writing = self.writing, None
        if writing:
            try:
                writing.result()
            except OSError as error:  # somebody has deleted the folder
                raise UserError(f"could not write a checkpoint in {self.folder}: {error.strerror}") from error

    def write(
        self,
        path: Path,
        state: dict[str, Any],
        shards: Future | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        if shards:
            try:
                shards.result()
            except (OSError, RuntimeError, dcp.CheckpointException) as error:
                raise UserError(f"could not write {path}{free_space(self.folder)}: {error}") from error
        if not self.parallel.is_main:
            return
        atomic_write(path / STATE, lambda file: torch.save(state, file))
        checksums = "".join(f"{file_checksum(file)}  {file.name}\n" for file in sorted(path.iterdir()))
        write_text(path.with_suffix(".sha256"), checksums)
        finished = list_checkpoints(self.folder)
        for old in finished[: -self.keep]:
            old.with_suffix(".sha256").unlink()
        for old in self.folder.glob("step_*/"):  # with those that a killed run has left unfinished
            if old not in finished[-self.keep :]:
                shutil.rmtree(old)
        then()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy that the training does not change."""
    return tensor.detach().to("cpu", copy=True)


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
    wanted = {name: checksum for checksum, found, name in (line.partition("  ") for line in lines) if found}
    files = [path / name for name in wanted]
    return bool(files) and all(f.is_file() and file_checksum(f) == wanted[f.name] for f in files)


def load_state(path: Path) -> dict[str, Any]:
    """What `CheckpointWriter.save` was given as `state`; with tensors, unless the model was shared out."""
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
