"""`litgpt pretrain`, held before each optimizer step until it is asked for.

Run by a Python where litgpt is (`benchmarks/litgpt.txt`), not by MiniMind's: litgpt needs older libraries.
The first line on stdin is JSON: what to train. For each line after it litgpt's own loop makes one optimizer
step, and the answer on stdout is how many tokens that trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class Chunks(IterableDataset):
    """The token file cut into pieces of one length, wherever documents end, as litgpt's `TokensLoader` does.

    The loop asks for the next pass only when it is through with the last, so here is where it is held.
    """

    def __init__(self, tokens: np.ndarray, rows: int, passes: int, length: int, replies: TextIO) -> None:
        """Args: length: of a row, with the one token more that is the last target."""
        self.tokens, self.replies = tokens, replies
        self.rows, self.passes, self.length = rows, passes, length

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for _ in sys.stdin:
            for _ in range(self.passes):
                yield self.batch(start)
                start += self.rows * self.length
            print(self.passes * self.rows * (self.length - 1), file=self.replies, flush=True)
        os._exit(0)  # nobody listens any more, and there is nothing to save

    def batch(self, start: int) -> Tensor:
        """The rows from a place in the file on, at its end going on at its beginning."""
        places = np.arange(start, start + self.rows * self.length) % len(self.tokens)
        return torch.from_numpy(self.tokens[places].astype(np.int64)).view(self.rows, self.length)


class Data(DataModule):
    """Chunks to train on; and one pass of them, since litgpt validates before it begins."""

    def __init__(self, chunks: Chunks) -> None:
        super().__init__()
        self.chunks = chunks

    def connect(self, **_: object) -> None:
        """The tokens are made already."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.chunks, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.chunks.batch(0)], batch_size=None)


def train(setting: dict, replies: TextIO) -> None:
    """litgpt's `pretrain` of the model in `setting`, with its defaults wherever the comparison allows."""
    torch._dynamo.config.disable = not setting["compile"]
    rows, passes, length = setting["rows"], setting["passes"], setting["max_seq_len"]
    tokens = np.load(setting["tokens"], mmap_mode="r")
    pretrain.setup(
        model_name="minimind",
        model_config=Config(name="minimind", **setting["model"]),
        out_dir=Path(setting["out_dir"]),
        data=Data(Chunks(tokens, rows, passes, length + 1, replies)),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=rows * passes,
            micro_batch_size=rows,
            lr_warmup_steps=100,
            max_tokens=10**12,
            max_seq_length=length,
            tie_embeddings=True,
            max_norm=1.0,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1),
        devices=1,
        logger_name="csv",
    )


def main() -> None:
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # litgpt's own words are no answers
        train(json.loads(sys.stdin.readline()), replies)


if __name__ == "__main__":
    main()
