"""Find out before training what would spoil it.

    minimind doctor                                              this machine
    torchrun --nproc_per_node 2 -m minimind doctor               and how the processes of a run find together

Each finding is one line: OK, WARNING or PROBLEM. The exit code is 1 when there is a problem. For data there
is `minimind data check FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.flags import flag, parse_flags
from minimind.paths import OUT_DIR


@dataclass(frozen=True)
class DoctorOptions:
    out_dir: Path = flag(OUT_DIR, "folder that must have room for weights and checkpoints")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DoctorOptions, argv, __doc__)
    from minimind.doctor import machine

    return machine.examine(options.out_dir)
