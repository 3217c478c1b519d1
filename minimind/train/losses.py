"""What a model says at the target tokens of a batch: the part that objectives and measurements share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.batches import Batch
from minimind.model import MiniMind, Routing


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
    """One forward pass, with logits at the targets alone."""
    where = batch.targets_at
    out = model(batch.input_ids, batch.position_ids, batch.document_ids, logits_at=where)
    labels, weights = batch.labels.flatten()[where], batch.loss_mask.flatten()[where]
    logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
    return AtTargets(logits, labels, weights, out.routing)
