"""What is minimised. An objective maps a model and a batch to a sum over the batch's units.

A unit is a target token, or whatever else the objective counts in (pairs, for preferences). The loop divides
by the number of units of the whole optimizer step, so that the split of a step into batches, accumulation
and processes does not change the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.data.batches import Batch, PackedDataset
from minimind.evaluate.bits_per_byte import bits_per_byte
from minimind.model import MiniMind, Routing
from minimind.tokenizer import Tokenizer
from minimind.train.losses import at_targets
from minimind.train.parallel import Parallel


class Loss(NamedTuple):
    total: Tensor  # () what to differentiate: a sum over units
    logged: Tensor  # () the part of it to log as the loss, without the experts' balance
    metrics: dict[str, Tensor]  # further numbers for the log, each a mean over the units of the batch


class Objective(ABC):
    """What the loop asks of an objective. `loss` has to be written; the rest is for those who need it."""

    teacher: MiniMind | None = None  # that is asked about each batch
    flops_per_token = 0.0  # which it spends
    scores_first = False  # whether `begin` has the model read all data once

    def setup(self, config: ModelConfig, tokenizer: Tokenizer, parallel: Parallel) -> None:
        """Once in every process, before its first step; `config` is the trained model's."""

    def identity(self) -> dict[str, Any]:
        """What else decides the results of a run: a resumed one must have the same."""
        return {}

    def begin(
        self, model: MiniMind, datasets: list[PackedDataset], parallel: Parallel, batch_size: int
    ) -> None:
        """At the start of a new run, when `model` still has the weights it starts from."""

    def state_dict(self, datasets: list[PackedDataset]) -> dict[str, Any]:
        """What `begin` found out, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any], datasets: list[PackedDataset]) -> None:
        """Takes the place of `begin` in a run that is resumed."""

    @abstractmethod
    def loss(self, model: MiniMind, batch: Batch, balance_coef: float) -> Loss:
        """The loss of a batch, to be differentiated; `balance_coef` is for `with_balance`."""

    def evaluate(
        self,
        model: MiniMind,
        data: PackedDataset,
        tokenizer: Tokenizer,
        parallel: Parallel,
        batch_size: int,
        max_rows: int | None,
    ) -> dict[str, float]:
        """Scores of `model` on the first `max_rows` rows of held-out data, under the names of the log."""
        score = bits_per_byte(model, data, tokenizer, parallel, batch_size, max_rows)
        return {"eval_loss": score.loss, "eval_bpb": score.bits_per_byte}


class NextToken(Objective):
    """Cross-entropy of the next token, and the experts' balance loss where there are experts."""

    def loss(self, model: MiniMind, batch: Batch, balance_coef: float) -> Loss:
        targets = at_targets(model, batch)
        return with_balance((targets.nll * targets.weights).sum(), {}, batch, targets.routing, balance_coef)


def with_balance(
    loss: Tensor, metrics: dict[str, Tensor], batch: Batch, routing: list[Routing], balance_coef: float
) -> Loss:
    """`loss` with the experts' balance loss added; a dense model has no `routing` and adds nothing.

    Each row's balance loss counts as often as the row has units, so both parts share one denominator.
    """
    if not routing:
        return Loss(loss, loss.detach(), metrics)
    balance = torch.stack([r.balance_loss for r in routing]).mean(dim=0)  # (B,)
    load = torch.stack([r.expert_load for r in routing]).mean(dim=0)  # (E,)
    balance_sum = (balance * batch.row_units).sum()
    total = loss + balance_coef * len(routing) * balance_sum
    metrics = metrics | {"balance_loss": balance_sum.detach() / batch.row_units.sum().clamp(min=1)}
    metrics |= {f"expert_load/{i}": share for i, share in enumerate(load.detach())}
    return Loss(total, loss.detach(), metrics)
