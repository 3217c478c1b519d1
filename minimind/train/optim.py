"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

ON_CPU = 8  # matrices that Muon updates at once; more take memory, and are no faster


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


class Update(NamedTuple):
    """What Muon is about to do to matrices of one shape."""

    matrices: list[Tensor]
    momenta: list[Tensor]
    direction: Tensor  # (n, A, B)


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for sharded matrices too, and in fewer, larger products.

    The singular values of a matrix need all of it: each process gathers the gradients, works out the same
    update, and applies its part. Left to sharded products, their rounding would differ with the processes.
    """

    prepared: dict[int, list[Update]] | None = None  # by the number of the parameter group

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if all(p.device.type in ("cuda", "cpu") and not isinstance(p, DTensor) for p in parameters):
            for i, group in enumerate(self.param_groups):
                updates = self.prepared[i] if self.prepared else self.updates(group)
                for update in updates:
                    self.apply(update, group)
            self.prepared = None
            return None
        for parameter in parameters:
            if isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=[Replicate()])
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.prepared = None
        super().zero_grad(set_to_none)

    def prepare(self) -> None:
        """Have a GPU work out the next step's updates, and change nothing, before it is known whether there
        will be a step: to have that answer takes all gradients, and then the GPU would wait for more work."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if all(p.device.type == "cuda" and not isinstance(p, DTensor) for p in parameters):
            self.prepared = {i: list(self.updates(group)) for i, group in enumerate(self.param_groups)}

    def updates(self, group: dict[str, Any]) -> Iterator[Update]:
        """What PyTorch's step does to one matrix after the other, with matrices of a shape as one batch.

        A small model's matrices keep a GPU waiting: on an H100, 56 of them took 30 ms one by one, half as
        long as forward and backward of 65,536 tokens. The cores of a CPU wait for each other in each product:
        two took 135 ms for eight of `moe` one by one, 83 in a batch, where each has matrices of its own.
        """
        of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                of_shape[parameter.shape].append(parameter)
        for matrices in of_shape.values():
            at_once = ON_CPU if matrices[0].device.type == "cpu" else len(matrices)
            for i in range(0, len(matrices), at_once):
                yield self.update_of(matrices[i : i + at_once], group)

    @torch.no_grad()
    def update_of(self, matrices: list[Tensor], group: dict[str, Any]) -> Update:
        """For matrices of one shape, each of which has a gradient."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        # Nesterov's: between the gradient and the momentum with it, lerp(g, lerp(m, g, 1 - μ), μ).
        looking_ahead = torch._foreach_lerp(gradients_of(matrices), momenta, group["momentum"] ** 2)
        stacked = matrices[0].new_empty((len(matrices), *matrices[0].shape), dtype=torch.bfloat16)
        torch._foreach_copy_(list(stacked), looking_ahead)
        # What is laid out otherwise than the weights would be added matrix by matrix.
        direction = orthogonalized(stacked, group).to(
            matrices[0].dtype, memory_format=torch.contiguous_format
        )
        return Update(matrices, momenta, direction)

    @torch.no_grad()
    def apply(self, update: Update, group: dict[str, Any]) -> None:
        matrices, momenta, direction = update
        torch._foreach_lerp_(momenta, gradients_of(matrices), 1 - group["momentum"])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(matrices[0].shape))  # "match_rms_adamw"
        torch._foreach_add_(matrices, list(direction), alpha=-rate)


def gradients_of(matrices: list[Tensor]) -> list[Tensor]:
    return [matrix.grad for matrix in matrices if matrix.grad is not None]


def orthogonalized(x: Tensor, group: dict[str, Any]) -> Tensor:
    """Matrices x (n, A, B) in bf16 with all singular values near 1, by Newton and Schulz's iteration
    (Jordan et al. 2024), under the settings of PyTorch's Muon."""
    a, b, c = group["ns_coefficients"]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a norm of `max_norm`; returns the norm before, ()."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
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
