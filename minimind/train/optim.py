"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def build_optimizers(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, embedding_rate: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters, each parameter in exactly one.

    `muon` takes the matrices inside the layers: momentum whose singular values are made equal (Jordan et
    al. 2024; scaled to AdamW's update size, Liu et al. 2025, arXiv:2502.16982). Embeddings, routers and
    norms stay with AdamW, the embeddings at `embedding_rate` times the learning rate; only matrices decay.
    """
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vectors = [p for _, p in parameters if p.dim() < 2]
    embeddings = [p for n, p in parameters if "embed_tokens" in n]
    routers = [p for n, p in parameters if ".gate.weight" in n]
    taken = {*vectors, *embeddings, *routers}
    hidden = [p for _, p in parameters if p not in taken]

    optimizers: list[torch.optim.Optimizer] = []
    groups = [{"params": vectors, "weight_decay": 0.0}]
    if name == "muon":
        muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
        groups.append({"params": routers})
        groups.append({"params": embeddings, "lr": learning_rate * embedding_rate})
    else:
        groups.append({"params": embeddings + routers + hidden})
    groups = [group for group in groups if group["params"]]
    if groups:
        adamw = torch.optim.AdamW(
            groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        optimizers.append(adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for sharded matrices too.

    The singular values of a matrix need all of it: each process gathers the gradients, works out the same
    update, and applies its part. Left to sharded products, their rounding would differ with the processes.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter.grad, DTensor):
                    parameter.grad = parameter.grad.redistribute(placements=[Replicate()])
        return super().step(closure)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a norm of `max_norm`; returns the norm before, ()."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def learning_rate_scale(step: int, total_steps: int, warmup_steps: int, floor: float = 0.1) -> float:
    """Share of the peak learning rate at `step` (0-based).

    Linear warm-up to 1 over `warmup_steps`, then half a cosine down to `floor` at the last step
    (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
