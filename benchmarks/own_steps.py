"""This project's training loop, one optimizer step at a time, for the benchmarks."""

from __future__ import annotations

import time
from itertools import count

from minimind.data.batches import prefetch
from minimind.errors import UserError
from minimind.train.loop import Stage, Trainer
from minimind.train.options import TrainOptions
from minimind.train.parallel import setup
from minimind.train.signals import StopSignals
from minimind.train.step import optimizer_step

EPOCHS = 1000  # so that a small file does not end before the benchmark


class OwnSteps:
    """What `Trainer.train_steps` does, without logging and saving: its rows are made ahead by a thread.

    Attributes:
        waited: seconds that the last step waited for its rows.
        took: seconds of the last step, waiting included.
    """

    def __init__(self, stage: Stage, options: TrainOptions) -> None:
        self.trainer = Trainer(stage, options, setup("cpu", "auto"))
        self.trainer.peak_rate = 1.0  # it is for the log alone
        self.numbers = count()
        self.batches = prefetch(self.trainer.step_batches(0))
        self.waited = self.took = 0.0

    def step(self) -> int:
        """One optimizer step; returns its useful tokens: positions that are not padding, each with a target
        or a next token of its own document.

        Raises: UserError when memory runs out, since the rows of the next step would be others.
        """
        began = time.perf_counter()
        batches = next(self.batches)
        self.waited = time.perf_counter() - began
        values = optimizer_step(self.trainer, next(self.numbers), batches, StopSignals())
        if values is None:
            raise UserError("not enough memory for a step; choose a smaller --preset or fewer rows")
        self.took = time.perf_counter() - began
        return int(values["tokens"])
