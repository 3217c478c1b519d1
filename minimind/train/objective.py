"""What is minimised. An objective maps a model and a batch to a sum over target tokens.

The loop divides by the number of target tokens of the whole optimizer step, so that the split of a step
into batches, accumulation and processes does not change the training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.batches import Batch
from minimind.model import MiniMind


class Loss(NamedTuple):
    total: Tensor  # () what to differentiate: a sum over target tokens
    cross_entropy: Tensor  # () the language-modelling part of it, in nats, for the log
    metrics: dict[str, Tensor]  # further numbers for the log, of this batch


def next_token_loss(model: MiniMind, batch: Batch, balance_coef: float) -> Loss:
    """Cross-entropy of the next token, and the experts' balance loss where there are experts.

    Each row's balance loss counts as often as the row has targets, so both parts share one denominator.
    """
    nll, weights, routing = token_losses(model, batch)
    cross_entropy = (nll * weights).sum()
    if not routing:
        return Loss(cross_entropy, cross_entropy.detach(), {})
    targets_in_row = batch.loss_mask.sum(dim=1)  # (B,)
    balance = torch.stack([r.balance_loss for r in routing]).mean(dim=0)  # (B,)
    load = torch.stack([r.expert_load for r in routing]).mean(dim=0)  # (E,)
    total = cross_entropy + balance_coef * len(routing) * (balance * targets_in_row).sum()
    metrics = {"balance_loss": balance.detach().mean()}
    metrics |= {f"expert_load/{i}": share for i, share in enumerate(load.detach())}
    return Loss(total, cross_entropy.detach(), metrics)


def token_losses(model: MiniMind, batch: Batch) -> tuple[Tensor, Tensor, list]:
    """Cross-entropy (M,) in nats and weight (M,) of the M target tokens of a batch, and the routing."""
    out = model(batch.input_ids, batch.position_ids, batch.document_ids, logits_at=batch.targets_at)
    labels = batch.labels.flatten()[batch.targets_at]  # (M,)
    nll = F.cross_entropy(out.logits.float(), labels, reduction="none")
    return nll, batch.loss_mask.flatten()[batch.targets_at], out.routing
