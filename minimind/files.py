"""Writing files so that a crash, a kill or a full disk never leaves half of one under its name."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from minimind.errors import UserError


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a file beside `path`, flush it to the disk, and rename it into place.

    Raises: UserError when the disk is full or the folder is not writable, or when `path` is there and no
        file (a folder, /dev/null); it is then as it was.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"could not write {path}: it is no plain file")
        with temporary_beside(path) as temporary:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise failed_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8. Raises: UserError as `atomic_write` does."""
    atomic_write(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; renamed into its place when all is there, else removed.

    Raises: UserError when `folder` is there and not empty, or when a write fails.
    """
    refuse_to_replace(folder)
    folder = folder.resolve()
    try:
        with temporary_beside(folder) as temporary:
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                sync(path)
            sync(temporary)
            refuse_to_replace(folder)  # another process may have been faster
            put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise failed_write(folder, error) from error


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the folder of `path`; what bears it at the end is removed, also when SIGTERM is the end.

    A process that has its own way with SIGTERM, as a training run has, keeps it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    in_main = threading.current_thread() is threading.main_thread()  # no other may handle signals
    unwinds = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if unwinds:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield temporary
    finally:
        remove(temporary)
        if unwinds:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def put_in_place(path: Path, final: Path) -> None:
    """Rename what is wholly on the disk; the new name survives a power cut too."""
    path.replace(final)
    sync(final.parent)


def refuse_to_replace(path: Path, mend: str = "move it or name another") -> None:
    """Raises: UserError, with the `mend`, when `path` is there already and anything but an empty folder."""
    try:
        place = path.resolve()  # "missing/../there" is there once missing/ has been made
        empty = place.is_dir() and not any(place.iterdir())
        there = path.is_symlink() or (place.exists() and not empty)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another") from None
    if there:
        raise UserError(f"{path} exists already; {mend}")


def check_ending(flag: str, path: Path | None, *endings: str) -> None:
    """Data or weights must not be lost to a slip. Raises: UserError for a file of another kind."""
    if path and path.is_file() and path.suffix.lower() not in endings:
        raise UserError(f"{flag} {path} is there and ends in no {' or '.join(endings)}; name another")


def remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed in the middle of a write have left beside `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not is_running(left.name.split(".")[-2]):
            remove(left)


def remove(path: Path) -> None:
    """Delete a file or a folder as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def failed_write(path: Path, error: Exception) -> UserError:
    """How much room there is belongs to the message unless the system gives another reason."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    room = free_space(path.parent) if number in (None, errno.ENOSPC, errno.EDQUOT) else ""
    return UserError(f"could not write {path}: {reason or 'the write broke off'}{room}")


def free_space(folder: Path) -> str:
    """A clause that says how much room there is; a full disk is the usual reason of a failed write."""
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
    except OSError:
        return ""


def shown_size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path, flag: str = "--out_dir") -> None:
    """Fail before an hour of work rather than after it; `flag` is what named the folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder} cannot be written to: it is no folder; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the run may have been here too
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to ({error.strerror})") from None
