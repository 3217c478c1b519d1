"""What a model says at the target tokens of a batch: the part that objectives and measurements share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.blocks import CAN_COMPILE
from minimind.data.batches import Batch, PackedDataset
from minimind.model import MiniMind, Routing
from minimind.train.compiling import uncompiled
from minimind.train.parallel import Parallel


@dataclass(frozen=True)
class AtTargets:
    """M target tokens of a batch."""

    filled_logits: Tensor  # (F, V) in the precision they were computed in; of no target after the first M
    labels: Tensor  # (M,) int64
    weights: Tensor  # (M,) fp32, in the loss
    routing: list[Routing]

    @property
    def logits(self) -> Tensor:
        """(M, V)"""
        return self.filled_logits[: len(self.labels)]

    @cached_property
    def nll(self) -> Tensor:
        """(M,) the negative log-likelihood of the labels, in nats and at least fp32."""
        logits = self.filled_logits
        labels = F.pad(self.labels, (0, len(logits) - len(self.labels)))  # (F,)
        trained_on_gpu = logits.device.type == "cuda" and CAN_COMPILE and logits.requires_grad
        nll = (compiled_nll() if trained_on_gpu else negative_log_likelihood)(logits, labels)
        return nll[: len(self.labels)]


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """All logits at once: 32 rows of 512 have 16,384 × 6,400 of them, 0.2 GB in bf16. With the fp32 copy, its
    log-softmax and their gradients it is some 1.9 GB at the peak, which is not worth a loop over pieces.
    """
    return F.cross_entropy(at_least_fp32(logits), labels, reduction="none")


@cache
def compiled_nll() -> Callable[[Tensor, Tensor], Tensor]:
    """On a GPU the fp32 copies stay in registers: a tenth of a small model's pass was their traffic.

    The number of targets is another in each batch.
    """
    return torch.compile(negative_log_likelihood, dynamic=True)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def at_targets(model: MiniMind, batch: Batch) -> AtTargets:
    """One forward pass, with logits at the targets alone."""
    where = batch.targets_at
    at = filled_up(where)
    out = model(batch.input_ids, batch.position_ids, batch.document_ids, logits_at=at)
    labels, weights = batch.labels.flatten()[where], batch.loss_mask.flatten()[where]
    return AtTargets(out.logits, labels, weights, out.routing)


def filled_up(where: Tensor) -> Tensor:
    """The indices `where` (M,), the last one repeated up to one of 16 lengths between two powers of two.

    The number of targets is another in each batch, and a CPU's products are built for each size they meet: on
    two cores some 35 ms of a pass of 1.4 s. So few sizes occur, for at most a sixteenth more rows.
    """
    unit = 1 << max(len(where).bit_length() - 5, 0)
    return torch.cat((where, where[-1:].expand(-len(where) % unit)))


@torch.no_grad()
def at_all_targets(
    model: MiniMind, data: PackedDataset, parallel: Parallel, batch_size: int, max_rows: int | None = None
) -> Iterator[tuple[Batch, AtTargets]]:
    """This process's share of the first `max_rows` rows of `data`, and what `model` says there.

    All processes make as many forward passes, with padding where one has no rows: a sharded model needs them
    all for each. On a GPU they are not compiled: code for them alone takes longer to make than it saves.
    """
    rows = min(data.num_rows, max_rows or data.num_rows)
    was_training = model.training
    model.eval()
    for together in range(0, rows, parallel.world_size * batch_size):
        start = min(together + parallel.rank * batch_size, rows)
        parallel.beat("scoring")
        batch = data.batch(0, start, min(batch_size, rows - start), min_rows=batch_size).to(parallel.device)
        with parallel.autocast(), uncompiled(model) if batch.input_ids.is_cuda else nullcontext():
            targets = at_targets(model, batch)
        yield batch, targets
    model.train(was_training)
