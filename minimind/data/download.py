"""Fetch MiniMind's published data into dataset/, from ModelScope or Hugging Face.

    minimind data download                                       the pair to begin with
    minimind data download dpo.jsonl r1_mix_1024.jsonl           others; a wrong name lists what there is

A download that broke off goes on where it was when the command is given again. A file gets its name when it
is whole and has the SHA-256 that the hub publishes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from minimind.errors import UserError
from minimind.files import check_writable, free_space, put_in_place, shown_size, sync
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR

if TYPE_CHECKING:
    from minimind.data.hubs import Hub, HubFile

RECOMMENDED = ("pretrain_hq.jsonl", "sft_mini_512.jsonl")


@dataclass(frozen=True)
class DownloadOptions:
    files: tuple[str, ...] = flag(RECOMMENDED, "files to fetch", positional=True)
    source: str = flag("modelscope", "the hub to fetch from", choices=("modelscope", "huggingface"))
    data_dir: Path = flag(DATASET_DIR, "folder to put them into")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DownloadOptions, argv, __doc__)
    from minimind.data.hubs import connect

    check_writable(options.data_dir, "--data_dir")
    hub = connect(options.source)
    wanted = find(hub, dict.fromkeys(options.files))
    for file in wanted:
        print(f"{file.name:<24}{shown_size(file.size):>10}")
    print(f"from {hub.title} ({hub.repo}) into {options.data_dir}", flush=True)
    partial = options.data_dir / ".cache" / "download" / options.source
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(partial / "download.lock", timeout=0):
            download(hub, wanted, options.data_dir, partial)
    except Timeout:
        raise UserError(f"another download into {options.data_dir} is running; wait for it") from None
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise
    return 0


def find(hub: Hub, names: Collection[str]) -> list[HubFile]:
    """The files of these names. Raises: UserError for a name that the hub has not, with those it has."""
    try:
        files = hub.files()
    except hub.errors as error:
        raise UserError(f"{hub.title} does not list the files of {hub.repo}: {reason(error)}") from None
    for name in names:
        if name not in files:
            listed = "".join(f"\n  {file.name:<24}{shown_size(file.size):>10}" for file in files.values())
            raise UserError(f"{hub.title} has no {name} in {hub.repo}; there are:{listed or ' none'}")
    return [files[name] for name in names]


def download(hub: Hub, files: Sequence[HubFile], folder: Path, partial: Path) -> None:
    """Fetch those of `files` that `folder` has not, by way of the folder `partial`.

    Raises: UserError when there is no room, the network fails, or a checksum is wrong; whole files stay.
    """
    missing = [file for file in files if not is_there(folder / file.name, file)]
    check_room(missing, folder, partial)
    for file in missing:
        try:
            path = hub.fetch(file, partial)
        except hub.errors as error:
            raise UserError(
                f"{file.name}: the download broke off: {reason(error)}{free_space(folder)}. "
                "What has arrived is kept: the same command goes on from there"
            ) from None
        if not is_same(path, file):
            path.unlink()
            raise UserError(
                f"{file.name}: what arrived is not what {hub.title} publishes (its SHA-256 or length "
                "differs) and was deleted; try again, or the other --source"
            )
        final = folder / file.name
        final.parent.mkdir(parents=True, exist_ok=True)
        sync(path)
        put_in_place(path, final)
        print(f"{final}: complete" + (", SHA-256 as published" if file.sha256 else ""), flush=True)


def is_there(path: Path, file: HubFile) -> bool:
    """Whether `path` is `file` already. Raises: UserError when it is something else."""
    if not path.exists():
        return False
    if not is_same(path, file):
        raise UserError(
            f"{path} exists and is another file than the hub's; move it away, or name another --data_dir"
        )
    print(f"{path}: is there already")
    return True


def is_same(path: Path, file: HubFile) -> bool:
    """Whether the bytes at `path` are those that the hub publishes, as far as it tells."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as content:
        return file.sha256 in (None, hashlib.file_digest(content, "sha256").hexdigest())


def check_room(files: Sequence[HubFile], folder: Path, partial: Path) -> None:
    """Raise UserError when the disk cannot hold what is still to come."""
    needed = 0
    for file in files:
        halves = (partial / f"{file.name}.incomplete", partial / file.name)
        needed += file.size - max((half.stat().st_size for half in halves if half.is_file()), default=0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {shown_size(free)} free and {shown_size(needed)} are to come: "
            f"{shown_size(needed - free)} are missing; free them, or choose another --data_dir"
        )


def reason(error: Exception) -> str:
    """The first line of what a client says."""
    said = getattr(error, "strerror", None) or str(error)
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__
