"""Bits per byte: how well a model predicts text, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from minimind.data.batches import PackedDataset
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.train.losses import at_all_targets
from minimind.train.parallel import Parallel


class Score(NamedTuple):
    loss: float  # mean cross-entropy of a target token, in nats
    bits_per_byte: float  # all cross-entropy, in bits, over the UTF-8 bytes of the target tokens
    tokens: int  # targets, control tokens among them
    bytes: int


def bits_per_byte(
    model: MiniMind,
    data: PackedDataset,
    tokenizer: Tokenizer,
    parallel: Parallel,
    batch_size: int,
    max_rows: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Score:
    """Score `model` on the first `max_rows` rows of `data`, shared out over the processes.

    Control tokens count in the loss and as zero bytes, so ending a text wrongly costs bits too. `progress` is
    told after every batch how many rows it was.
    """
    bytes_of = torch.tensor([len(b) for b in tokenizer.token_bytes], device=parallel.device)
    sums, tokens = parallel.zeros(2), 0  # nats and bytes
    for batch, targets in at_all_targets(model, data, parallel, batch_size, max_rows):
        values = targets.nll.sum(), bytes_of[targets.labels].sum().float()
        sums += torch.stack(values).to(sums.device).double()
        tokens += len(targets.nll)
        progress(len(batch.input_ids))
    nats, num_bytes, all_tokens = parallel.sum(torch.cat((sums, sums.new_tensor([tokens])))).tolist()
    loss, bits = nats / max(all_tokens, 1), nats / math.log(2) / max(num_bytes, 1)
    return Score(loss, bits, int(all_tokens), int(num_bytes))
