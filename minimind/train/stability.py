"""Which updates to leave out: those whose loss or gradient is not finite, or whose loss leaps.

One bad batch can undo hours: its gradient, even clipped, points anywhere. Such a step is left out. When steps
keep failing the weights themselves are bad, and the loop goes back to a checkpoint (as PaLM was trained,
Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

WINDOW, FEWEST = 128, 32  # steps that a loss is compared with
DEVIATIONS, LEAP = 6.0, 0.5  # a leap is both: standard deviations, and nats, above the mean
ROLLBACKS = 3  # after so many the run ends


@dataclass
class Stability:
    """The losses of the last steps, and what went wrong so far. All processes hold the same."""

    limit: int  # steps left out in a row before the run goes back
    losses: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    @property
    def rate(self) -> float:
        """Share of the learning rate to train at: half of it for each time the run went back."""
        return 0.5**self.rollbacks

    def objection(self, loss: float, units: float, grad_norm: float) -> str | None:
        """Why a step must be left out, or None; the step is then counted.

        Args: loss: the step's mean over `units` units (target tokens, or pairs).
        """
        reason = None
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            reason = "the loss or its gradient is not finite"
        elif loss > (most := self.highest(units)):
            reason = f"the loss leaps to {loss:.3f}, above the {most:.3f} that the last steps make likely"
        if reason is None:
            self.losses.append((loss, units))
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    def highest(self, units: float) -> float:
        """The largest loss that `units` units may have; the fewer they are, the more it scatters."""
        if len(self.losses) < FEWEST or units <= 0:
            return math.inf
        mean = sum(loss for loss, _ in self.losses) / len(self.losses)
        variance = sum((loss - mean) ** 2 * n for loss, n in self.losses) / len(self.losses)  # of one unit
        return mean + max(DEVIATIONS * math.sqrt(variance / units), LEAP)

    def must_go_back(self) -> bool:
        return self.in_a_row >= self.limit

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(tuple(pair) for pair in state["losses"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.rollbacks = state["rollbacks"]
