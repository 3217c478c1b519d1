"""Mixture of experts: a router sends each token to the best few of several MLPs, beside shared ones.

The layer is Granite's shared-expert mixture (softmax over the chosen experts' logits equals the
renormalised softmax probabilities), so exports need no code of ours. No expert has a capacity: no token is
ever dropped, in training or in inference.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config import ModelConfig
from minimind.model import MLP, Routing, compute_dtype

STEP_OF_LENGTHS = 32  # rows


class MoE(nn.Module):
    """`num_experts` routed SwiGLUs, of which each token visits `num_experts_per_tok`, plus shared SwiGLUs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))
        self.shared_experts = nn.ModuleList(MLP(config) for _ in range(config.num_shared_experts))

    def forward(self, x: Tensor, is_token: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, H) → (B, T, H) and its routing; `is_token` (B, T) is False at padding."""
        with torch.autocast(x.device.type, enabled=False):  # the router decides in fp32
            scores = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)  # (B, T, E)
        top_experts = highest(scores, self.top_k)  # (B, T, k)
        top_scores = (scores[..., None, :] * one_hot(top_experts, scores.shape[-1])).sum(dim=-1)  # (B, T, k)
        top_scores = top_scores / top_scores.sum(dim=-1, keepdim=True)

        out = self.visit_experts(x.flatten(0, 1), top_scores.flatten(0, 1), top_experts.flatten(0, 1))
        out = out.view_as(x)
        for shared in self.shared_experts:
            out = out + shared(x)
        return out, balance(scores, top_experts, is_token)

    def visit_experts(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Each expert works once, on a block of rows that holds the tokens sent to it.

        x (M, H), weights and experts (M, k) → (M, H). The blocks, one after the other, have P rows.
        """
        visited = one_hot(experts.flatten(), len(self.experts))  # (M·k, E)
        visits = visited.sum(dim=0)  # (E,)
        in_one = grouped(x, self.experts)
        # In one product no block is filled up, and nobody waits for the GPU to tell its length.
        lengths = visits if in_one else filled_up(visits)  # (E,)
        rows = experts.numel() if in_one else int(lengths.sum())
        places = places_of_visits(visited, lengths - visits).view_as(experts)  # (M, k)
        visitors = torch.arange(len(x), device=x.device)[:, None].expand_as(places)
        # Rows that fill up read token 0, and nobody reads them.
        tokens = places.new_zeros(rows).scatter(0, places.flatten(), visitors.flatten())  # (P,)
        shares = weights.new_zeros(rows).scatter(0, places.flatten(), weights.flatten())  # (P,)

        sent = Sent.apply(x.to(compute_dtype(x)), tokens, places)  # (P, H)
        if in_one:
            y = together(self.experts, sent, visits)  # (P, H)
        else:
            blocks = sent.split(lengths.tolist())
            y = torch.cat([expert(block) for expert, block in zip(self.experts, blocks, strict=True)])
        return Collected.apply(y * shares[:, None].type_as(y), tokens, places)


def highest(scores: Tensor, k: int) -> Tensor:
    """Where the k highest of scores (…, E) are, the highest first: (…, k).

    On a GPU `topk` is two kernels and its gradient a third; this becomes part of what is around it.
    """
    left, found = scores.detach(), []
    for _ in range(k):
        found.append(left.argmax(dim=-1))
        left = left.masked_fill(one_hot(found[-1], left.shape[-1]), -torch.inf)
    return torch.stack(found, dim=-1)


def one_hot(experts: Tensor, num_experts: int) -> Tensor:
    """experts (…) → (…, E), True at each one's number."""
    return experts[..., None] == torch.arange(num_experts, device=experts.device)


class Sent(torch.autograd.Function):
    """Each token to all its places: x (M, H), tokens (P,), places (M, k) → (P, H).

    Gathering by index has a gradient that is added up row by row, with atomics on a GPU. As a token knows its
    places, it can be gathered, too: that is `Collected`, and each of the two is the other's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return Collected.apply(gradient, *ctx.saved_tensors), None, None


class Collected(torch.autograd.Function):
    """The sum of each token's rows: y (P, H), tokens (P,), places (M, k) → (M, H)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, places)
        return reduce(torch.add, (y.index_select(0, place) for place in places.unbind(dim=1)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return Sent.apply(gradient, *ctx.saved_tensors), None, None


def places_of_visits(visited: Tensor, filling: Tensor) -> Tensor:
    """The row of each visit when every expert has a block of rows, its visits in their order, then filling.

    visited (visits, E), one-hot; filling (E,), how many rows → (visits,).
    """
    by_expert = visited.T  # (E, visits)
    counted = by_expert.flatten().cumsum(dim=0).view_as(by_expert) - 1  # places, were there no filling
    before = filling.cumsum(dim=0) - filling  # (E,) of the blocks of earlier experts
    return ((counted + before[:, None]) * by_expert).sum(dim=0)


def filled_up(visits: Tensor) -> Tensor:
    """Lengths of blocks (E,) with room for `visits` (E,).

    On a CPU a product of a new shape has its kernel built first, as long as two of them take. So there are
    few lengths, except for short blocks, as in generation.
    """
    filled = (visits + STEP_OF_LENGTHS - 1) // STEP_OF_LENGTHS * STEP_OF_LENGTHS
    return filled.where((visits > STEP_OF_LENGTHS) & (visits.device.type == "cpu"), visits)


def grouped(x: Tensor, experts: nn.ModuleList) -> bool:
    """Whether the experts can work in one product: a GPU's kernel wants bf16, widths of whole 16 bytes, and
    projections that are weights alone (no adapters), here as a whole (ZeRO 3 brings those it calls)."""
    if x.device.type != "cuda" or compute_dtype(x) is not torch.bfloat16:
        return False
    projections = [p for expert in experts for p in (expert.gate_proj, expert.up_proj, expert.down_proj)]
    return all(
        type(p) is nn.Linear
        and p.in_features % 8 == p.out_features % 8 == 0
        and p.weight.shape == (p.out_features, p.in_features)
        for p in projections
    )


def together(experts: nn.ModuleList, x: Tensor, visits: Tensor) -> Tensor:
    """All experts in three products, without waiting for the GPU to tell how many tokens each one gets.

    x (M·k, H) sorted by expert, visits (E,) → (M·k, H). On a GPU before Hopper, which has no kernel for
    it, PyTorch does wait, and multiplies for one expert after the other.
    """
    ends = visits.cumsum(dim=0).int()  # (E,) where the block of each expert ends

    def product(x: Tensor, name: str) -> Tensor:
        weights = torch.stack([getattr(expert, name).weight for expert in experts])  # (E, out, in)
        return F.grouped_mm(x, weights.to(x.dtype).transpose(1, 2), offs=ends)  # (M·k, out)

    return product(F.silu(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")


def balance(scores: Tensor, top_experts: Tensor, is_token: Tensor | None) -> Routing:
    """Sequence-wise balance loss (DeepSeek-V2, arXiv:2405.04434, eq. 23–25) and the experts' load.

    For a row of T tokens: Σ_i f_i·P_i, where f_i = E/(k·T) · (visits of expert i) and P_i = the mean score
    of expert i. It is 1 when all experts get the same, E/k when k experts get everything.

    Args: scores (B, T, E), top_experts (B, T, k), is_token (B, T) or None.
    """
    num_experts, top_k = scores.shape[-1], top_experts.shape[-1]
    visits = one_hot(top_experts, num_experts).sum(dim=2).to(scores.dtype)  # (B, T, E)
    if is_token is not None:
        visits = visits * is_token[..., None]
        scores = scores * is_token[..., None]
        tokens = is_token.sum(dim=1).clamp(min=1)[:, None].to(scores.dtype)  # (B, 1)
    else:
        tokens = scores.new_full((scores.shape[0], 1), scores.shape[1])
    frequency = visits.sum(dim=1) * num_experts / (top_k * tokens)  # (B, E)
    probability = scores.sum(dim=1) / tokens  # (B, E)
    load = visits.sum(dim=(0, 1))
    return Routing((frequency * probability).sum(dim=-1), load / load.sum().clamp(min=1))
