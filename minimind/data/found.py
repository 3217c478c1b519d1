"""Records that have something in common, by their lines in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

LINES_SHOWN = 5


@dataclass
class Found:
    """So many records, and the lines of the first ones."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, lines: np.ndarray) -> Self:
        """Those on `lines`."""
        return cls(len(lines), lines[:LINES_SHOWN].tolist())

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < LINES_SHOWN:
            self.lines.append(line)

    @property
    def where(self) -> str:
        more = ", …" if self.count > len(self.lines) else ""
        return f"line{'s' * (self.count > 1)} {', '.join(map(str, self.lines))}{more}"
