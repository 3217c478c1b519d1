"""Which rows of the data each process trains on, and when: the same steps, however many share them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """The rows of an epoch cut into optimizer steps, and each step into the passes of this process."""

    num_rows: int  # in an epoch
    rows_per_step: int  # of all processes; the last step of an epoch may have fewer
    batch_size: int  # rows that fit into one pass of one process
    rank: int = 0
    world_size: int = 1

    @property
    def rows_at_once(self) -> int:
        """Rows in one pass of this process: its share of the step, evenly over as few passes as can be."""
        share = math.ceil(self.rows_per_step / self.world_size)
        return math.ceil(share / math.ceil(share / self.batch_size))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_step)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def passes(self, step: int) -> list[range]:
        """The rows of each of this process's passes in a step; none in a pass that only others have rows for.

        All processes make the same number of passes, since they meet in each.
        """
        first = step % self.steps_per_epoch * self.rows_per_step
        end = min(first + self.rows_per_step, self.num_rows)
        together = self.rows_at_once * self.world_size
        passes = []
        for start in range(first, end, together):
            mine = start + self.rank * self.rows_at_once
            passes.append(range(min(mine, end), min(mine + self.rows_at_once, end)))
        return passes
