"""Find out before training what would spoil it.

    minimind doctor DATA.jsonl                                   the records of a data file
    minimind doctor                                              this machine
    torchrun --nproc_per_node 2 -m minimind doctor               and how the processes of a run find together

Each finding is one line: OK, WARNING or PROBLEM. The exit code is 1 when there is a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.errors import UserError
from minimind.flags import flag, parse_flags
from minimind.paths import OUT_DIR

KINDS = ("auto", "pretrain", "conversation", "reasoning", "preference")


@dataclass(frozen=True)
class DoctorOptions:
    data: Path | None = flag(None, "JSONL file, plain or .gz; without it, the machine", positional=True)
    kind: str = flag("auto", "what the records are; auto is told from the first", choices=KINDS)
    max_seq_len: int | None = flag(None, "length of a row in tokens; without it as the stage that reads them")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")
    out_dir: Path = flag(OUT_DIR, "folder that must have room for weights and checkpoints")

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and self.max_seq_len < 8:
            raise UserError(f"--max_seq_len is {self.max_seq_len}; it must be at least 8")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DoctorOptions, argv, __doc__)
    if options.data:
        from minimind.doctor.data import examine
        from minimind.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(options.tokenizer_path)
        return examine(options.data, options.kind, options.max_seq_len, tokenizer)
    from minimind.doctor.machine import examine

    return examine(options.out_dir)
