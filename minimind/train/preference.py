"""Direct preference optimisation (DPO): from pairs of answers, learn to give the better one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.batches import PairBatch, PairDataset
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.train.losses import AtTargets, at_all_targets, at_targets
from minimind.train.objective import Loss, Objective, with_balance
from minimind.train.parallel import Parallel


class Preference(Objective):
    """Raise the log-probability of chosen answers above that of rejected ones, against a reference model.

    Rafailov et al. 2023, arXiv:2305.18290. The reference is the model that training starts from. What it
    says does not change, so it is asked once, before the first step, and is not needed again.

    Args:
        beta: how dearly the model pays for leaving the reference; the paper's β.
        length_normalised: compare log-probabilities per token of an answer, not those of whole answers.
    """

    scores_first = True

    def __init__(self, beta: float, length_normalised: bool = False) -> None:
        self.beta, self.length_normalised = beta, length_normalised

    def begin(
        self, model: MiniMind, datasets: list[PairDataset], parallel: Parallel, batch_size: int
    ) -> None:
        """Work out `reference` of `datasets`. It stays 0 for pairs that are in no row."""
        if parallel.is_main:
            print("scoring all pairs with the starting weights, once, to measure against them", flush=True)
        for data in datasets:
            reference = torch.zeros_like(data.reference, device=parallel.device)
            for batch, targets in at_all_targets(model, data, parallel, batch_size):
                reference[batch.pairs] = self.answer_logps(targets, batch)
            data.reference = parallel.sum(reference).cpu()

    def state_dict(self, datasets: list[PairDataset]) -> dict[str, Any]:
        return {"references": [data.reference for data in datasets]}

    def load_state_dict(self, state: dict[str, Any], datasets: list[PairDataset]) -> None:
        for data, reference in zip(datasets, state["references"], strict=True):
            data.reference = reference

    def loss(self, model: MiniMind, batch: PairBatch, balance_coef: float) -> Loss:
        targets = at_targets(model, batch)
        losses, rewards = dpo_loss(self.answer_logps(targets, batch), batch.reference, self.beta)
        chosen, rejected = rewards.detach().unbind(dim=1)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
        }
        pairs = max(len(batch.pairs), 1)  # a process may have none
        metrics = {name: values.sum() / pairs for name, values in metrics.items()}
        return with_balance(losses.sum(), metrics, batch, targets.routing, balance_coef)

    def evaluate(
        self,
        model: MiniMind,
        data: PairDataset,
        tokenizer: Tokenizer,
        parallel: Parallel,
        batch_size: int,
        max_rows: int | None,
    ) -> dict[str, float]:
        """As `Objective.evaluate`, with bits per byte of the chosen answers. Those must not get much worse:
        a margin can also be had by making both answers unlikely, the rejected one more."""
        bytes_of = torch.tensor([len(b) for b in tokenizer.token_bytes], device=parallel.device)
        sums = parallel.zeros(7)
        for batch, targets in at_all_targets(model, data, parallel, batch_size, max_rows):
            logps = self.answer_logps(targets, batch)
            losses, rewards = dpo_loss(logps, batch.reference, self.beta)
            margins = rewards[:, 0] - rewards[:, 1]
            is_chosen = batch.sides % 2 == 0  # (M,)
            values = [
                torch.ones_like(losses),
                losses,
                logps[:, 0] > logps[:, 1],
                margins > 0,
                margins,
                targets.nll[is_chosen],
                bytes_of[targets.labels[is_chosen]],
            ]
            sums += torch.stack([value.sum().float() for value in values]).to(sums.device).double()
        pairs, loss, preferred, moved, margin, nats, num_bytes = parallel.sum(sums).tolist()
        return {
            "eval_loss": loss / pairs,
            "eval_accuracy": preferred / pairs,
            "eval_reward_accuracy": moved / pairs,
            "eval_margin": margin / pairs,
            "eval_bpb": nats / math.log(2) / num_bytes,
        }

    def answer_logps(self, targets: AtTargets, batch: PairBatch) -> Tensor:
        """log π(answer | prompt) of the chosen and the rejected answers (P, 2), in fp32.

        A sum over the tokens of the answer, or their mean where lengths are to be normalised. Under bf16 the
        rounding of the logits adds a noise of 0.08 nats to a sum over 140 tokens, and that of the layers
        before them 0.09 (measured): less than 0.01 of a reward at β = 0.1, so logits are left in bf16.
        """
        answers = 2 * len(batch.pairs)
        logps = targets.nll.new_zeros(answers).index_add(0, batch.sides, -targets.nll)
        if self.length_normalised:
            logps = logps / batch.sides.bincount(minlength=answers)
        return logps.view(-1, 2)


def dpo_loss(logps: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss (P,) of P pairs, and the rewards (P, 2) that it implies for their answers.

    -log σ(β (log π(c)/π_ref(c) - log π(r)/π_ref(r))), equation 7 of arXiv:2305.18290.

    Args: logps, reference: (P, 2) log-probabilities of chosen and rejected answers.
    """
    rewards = beta * (logps - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards
