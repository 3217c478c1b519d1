"""What a model says at the target tokens of a batch: the part that objectives and measurements share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.batches import Batch, PackedDataset
from minimind.model import MiniMind, Routing
from minimind.train.parallel import Parallel


class AtTargets(NamedTuple):
    """M target tokens of a batch."""

    logits: Tensor  # (M, V) at least fp32, whatever the precision they were computed in
    labels: Tensor  # (M,) int64
    weights: Tensor  # (M,) fp32, in the loss
    routing: list[Routing]

    @property
    def nll(self) -> Tensor:
        """(M,) the negative log-likelihood of the labels, in nats."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")


def at_targets(model: MiniMind, batch: Batch) -> AtTargets:
    """One forward pass, with logits at the targets alone.

    All logits at once: 32 rows of 512 have 16,384 × 6,400 of them, 0.2 GB in bf16. With the fp32 copy, its
    log-softmax and their gradients it is some 1.9 GB at the peak, which is not worth a loop over pieces.
    """
    where = batch.targets_at
    out = model(batch.input_ids, batch.position_ids, batch.document_ids, logits_at=where)
    labels, weights = batch.labels.flatten()[where], batch.loss_mask.flatten()[where]
    logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
    return AtTargets(logits, labels, weights, out.routing)


@torch.no_grad()
def at_all_targets(
    model: MiniMind, data: PackedDataset, parallel: Parallel, batch_size: int, max_rows: int | None = None
) -> Iterator[tuple[Batch, AtTargets]]:
    """This process's share of the first `max_rows` rows of `data`, and what `model` says there.

    All processes make as many forward passes, with padding where one has no rows: a sharded model needs them
    all for each.
    """
    rows = min(data.num_rows, max_rows or data.num_rows)
    was_training = model.training
    model.eval()
    for together in range(0, rows, parallel.world_size * batch_size):
        start = min(together + parallel.rank * batch_size, rows)
        parallel.beat("scoring")
        batch = data.batch(0, start, min(batch_size, rows - start), min_rows=batch_size).to(parallel.device)
        with parallel.autocast():
            targets = at_targets(model, batch)
        yield batch, targets
    model.train(was_training)
