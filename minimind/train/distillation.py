"""White-box distillation: learn from a larger model's whole distribution, not from its words alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config import ModelConfig
from minimind.data.batches import Batch
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.train.checkpoint import file_checksum
from minimind.train.losses import at_least_fp32, at_targets
from minimind.train.monitor import training_flops
from minimind.train.objective import Loss, Objective, with_balance
from minimind.train.parallel import Parallel
from minimind.weights import check_tokenizer, load_model


class Distillation(Objective):
    """α · cross-entropy + (1 − α) · T² · KL(teacher ‖ student), the latter at temperature T.

    Hinton et al. 2015, arXiv:1503.02531, section 2; T² keeps the two parts' gradients of one size whatever T.

    Args:
        teacher_path: weights of the teacher, of any size and kind with the student's tokenizer.
        how_to_make: the command that makes them, for the message when there are none.
    """

    teacher: MiniMind

    def __init__(self, teacher_path: Path, how_to_make: str, alpha: float, temperature: float) -> None:
        self.teacher_path, self.how_to_make = teacher_path, how_to_make
        self.alpha, self.temperature = alpha, temperature

    def setup(self, config: ModelConfig, tokenizer: Tokenizer, parallel: Parallel) -> None:
        """Load the teacher. Raises: UserError when it is missing, damaged or speaks other tokens."""
        teacher = load_model(self.teacher_path, self.how_to_make)
        if teacher.config.vocab_size != config.vocab_size:
            raise UserError(
                f"the teacher {self.teacher_path} has a vocabulary of {teacher.config.vocab_size}, the "
                f"student one of {config.vocab_size}; both must share one tokenizer"
            )
        check_tokenizer(self.teacher_path, tokenizer)
        self.teacher_sha256 = file_checksum(self.teacher_path)
        self.teacher = teacher.to(parallel.device).requires_grad_(False).eval()
        self.flops_per_token = training_flops(self.teacher) / 2  # it only goes forward

    def identity(self) -> dict[str, Any]:
        return {"teacher (its content)": self.teacher_sha256}

    def loss(self, model: MiniMind, batch: Batch, balance_coef: float) -> Loss:
        student = at_targets(model, batch)
        with torch.inference_mode():
            teacher = at_targets(self.teacher, batch)
        cross_entropy = (student.nll * student.weights).sum()
        divergence = (self.divergence(student.logits, teacher.logits) * student.weights).sum()
        loss = self.alpha * cross_entropy + (1 - self.alpha) * self.temperature**2 * divergence
        units = batch.row_units.sum().clamp(min=1)
        metrics = {"cross_entropy": cross_entropy.detach() / units, "kl": divergence.detach() / units}
        return with_balance(loss, metrics, batch, student.routing, balance_coef)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher ‖ student) (M,) in nats, of logits (M, V) at the temperature."""
        student = (at_least_fp32(student) / self.temperature).log_softmax(dim=-1)
        teacher = (at_least_fp32(teacher) / self.temperature).log_softmax(dim=-1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
