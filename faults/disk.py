"""A disk that is full when it is told to be."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from pathlib import Path

from faults.runs import Process

SIZE = 64 << 20


class Disk:
    """A file system in memory where one may be mounted; else a limit to the size of a process's files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.ballast = folder, folder / "ballast"
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)

    @property
    def kind(self) -> str:
        return "a full tmpfs" if self.mounted else "RLIMIT_FSIZE"

    def fill(self, process: Process) -> None:
        if not self.mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
            return
        with self.ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    def clear(self, process: Process | None = None) -> None:
        if self.mounted:
            self.ballast.unlink()
        elif process:
            no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, no_limit)
