"""How far a measured share can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

Z = 1.959964  # of a 95 % interval


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right: int, asked: int) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927).

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n): good for few cases too, where p ± z √(p(1 − p)/n)
    leaves [0, 1] or has no width.
    """
    if not asked:
        return Interval(0.0, 1.0)
    share, z2 = right / asked, Z * Z / asked
    middle = share + z2 / 2
    half = Z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked))
    return Interval(max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0))


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / max(self.total, 1)

    @property
    def interval(self) -> Interval:
        return wilson(self.count, self.total)

    def against(self, chance: float) -> str:
        """Whether this could be chance: whether the interval holds `chance`."""
        low, high = self.interval
        if low > chance:
            return "better than chance"
        return "worse than chance" if high < chance else "indistinguishable from chance"

    def __str__(self) -> str:
        """In percent, with its interval."""
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
