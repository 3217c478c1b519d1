"""Checkpoints: everything a run needs to go on exactly where it was.

    runs/{name}/checkpoints/step_00000500.pt      tensors and plain values, read back as data only
    runs/{name}/checkpoints/step_00000500.sha256  written last: a checkpoint without it does not exist

The newest `keep` are kept. A damaged one is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimind.errors import UserError
from minimind.files import atomic_write


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` (tensors, plain values) as the checkpoint of `step`; drop all but the newest `keep`."""
    path = folder / f"step_{step:08d}.pt"
    atomic_write(path, lambda file: torch.save(state, file))
    checksum = file_checksum(path)
    atomic_write(path.with_suffix(".sha256"), lambda file: file.write(checksum.encode()))
    for old in list_checkpoints(folder)[:-keep]:
        old.with_suffix(".sha256").unlink()
        old.unlink()
    return path


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none.

    Args: say: told, in a sentence, of each damaged checkpoint that was passed over.
    Raises: UserError when there are checkpoints and all are damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        if file_checksum(path).encode() == path.with_suffix(".sha256").read_bytes():
            return torch.load(path, map_location="cpu", weights_only=True)
        say(f"checkpoint {path} is damaged (its checksum differs); using the one before it")
    if checkpoints:
        raise UserError(f"all checkpoints in {folder} are damaged; start anew with --from_resume 0")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if path.with_suffix(".sha256").is_file())


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
