"""The decoder, top to bottom: everything a dense MiniMind computes is in this file.

A Llama-style network (Touvron et al. 2023, arXiv:2302.13971): pre-RMSNorm, rotary positions, grouped-query
attention, SwiGLU, tied embeddings. Parameter names are Llama's, so a dense model is `LlamaForCausalLM` and
a mixture of experts (`moe.py`) is `GraniteMoeSharedForCausalLM`.

Shapes: B rows, T positions, H hidden size, N query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind import blocks
from minimind.blocks import BlockMask
from minimind.config import ModelConfig, YarnScaling

# On a CPU. Keys behind the last of them are left out: a quarter of the scores in rows of 512 tokens, three
# eighths in rows of 1024. Of 128 a compiled layer is no faster, and twice as long in compiling.
QUERIES_AT_ONCE = 256


class Routing(NamedTuple):
    """What one mixture-of-experts layer did with a batch (see `moe.py`)."""

    balance_loss: Tensor  # (B,) one value a row, not yet multiplied by its coefficient
    expert_load: Tensor  # (E,) share of the routed tokens that each expert got; sums to 1


class ModelOutput(NamedTuple):
    logits: Tensor  # (B, T, V), or (M, V) when `logits_at` chose M positions
    routing: list[Routing]  # one entry a layer; empty for a dense model


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of matrix products on x: under autocast its dtype, else x's own.

    The residual stream has it, too: half the memory and traffic of fp32, which a GPU's norms are bound by.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return y.to(compute_dtype(x))


class RotaryEmbedding(nn.Module):
    """Rotation angles of rotary positions (Su et al. 2021, arXiv:2104.09864), optionally stretched by YaRN.

    The table is a function of the configuration, hence not part of the state dict.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        self.scale = 1.0
        if config.rope_scaling:
            frequencies = yarn_frequencies(frequencies, config, config.rope_scaling)
            self.scale = 0.1 * math.log(config.rope_scaling.factor) + 1.0
        self.register_buffer("frequencies", frequencies, persistent=False)  # (D / 2,)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rotate` multiplies components and partners by, (B, 1, T, D), at `position_ids` (B, T)."""
        angles = position_ids[:, None, :, None].float() * self.frequencies.float()  # (B, 1, T, D / 2)
        cos, sin = ((f(angles) * self.scale).to(dtype) for f in (torch.cos, torch.sin))
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def yarn_frequencies(frequencies: Tensor, config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """YaRN: slow rotations are interpolated, fast ones kept ("NTK-by-parts", arXiv:2309.00071, 3.2)."""

    def dimension_of(rotations: float) -> float:  # the dimension that turns so often over the trained length
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.head_dim - 1)
    ramp = (torch.arange(len(frequencies)).float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x (B, heads, T, D) by their position's angles."""
    partners = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + partners * sin


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | BlockMask | None) -> Tensor:
        """x (B, T, H) → (B, T, H). A tensor (B, 1, T, T) is added to the scores; None is causal."""
        split = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.q_proj(x).view(split).transpose(1, 2), *rotary)  # (B, N, T, D)
        key = rotate(self.k_proj(x).view(split).transpose(1, 2), *rotary)  # (B, K, T, D)
        value = self.v_proj(x).view(split).transpose(1, 2)  # (B, K, T, D)
        out = attend(query, key, value, mask)  # (B, N, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Softmax attention: query (B, N, T, D) over keys and values (B, K, S, D) → (B, N, T, D).

    The queries are the last T of S positions, and the mask hides what is behind each of them.

    On a GPU rows of packed documents have a block mask and a kernel for it (`blocks.py`). On a CPU they are
    computed as the equation reads, some queries at a time: in bf16 that takes half the time of PyTorch's
    fused kernel there. What that kernel saves is the memory of the scores, so it takes the long rows.
    """
    if isinstance(mask, BlockMask):
        return blocks.attend(query, key, value, mask)
    length = query.shape[2]
    if mask is None or query.device.type != "cpu" or not 1 < length <= 1024:
        causal = mask is None and length > 1
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    before = key.shape[2] - length  # keys that every query may look at
    parts = []
    for start in range(0, length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        seen = before + stop
        parts.append(
            weighted_values(
                query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask[:, :, start:stop, :seen]
            )
        )
    return torch.cat(parts, dim=2)


def weighted_values(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(query · key / √D + mask) · value: query (B, N, T, D), mask (B, 1, T, S) → (B, N, T, D)."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]  # the N / K heads of a group share keys: one product of N / K · T queries
    query = (query * width**-0.5).reshape(rows, groups, -1, width)  # (B, K, N / K · T, D)
    scores = (query @ key.transpose(-1, -2)).view(rows, heads, length, -1)  # (B, N, T, S)
    with torch.autocast(query.device.type, enabled=False):
        # A bf16 softmax sums in fp32, too. Autocast's would keep its fp32 result for the backward pass.
        probabilities = (scores + mask).softmax(dim=-1)
    out = probabilities.view(rows, groups, -1, key.shape[2]) @ value  # (B, K, N / K · T, D)
    return out.view(rows, heads, length, width)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.num_experts:
            from minimind.moe import MoE

            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        is_token: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None
        y, routing = self.mlp(h, is_token)
        return x + y, routing


class Layers(nn.ModuleList):
    """The decoder's layers, one after the other."""

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        is_token: Tensor | None,
    ) -> tuple[Tensor, list[Routing]]:
        routings = []
        for layer in self:
            x, routing = layer(x, rotary, mask, is_token)
            if routing is not None:
                routings.append(routing)
        return x, routings


class Decoder(nn.Module):
    """Embedding, layers and the last norm: token ids in, hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand(rows, -1)
        x = self.embed_tokens(input_ids)  # (B, T, H)
        x = x.to(compute_dtype(x))
        rotary = self.rotary(position_ids, x.dtype)
        mask = None
        if document_ids is not None:
            mask = attention_mask(document_ids, rotary[0].shape[-1])
        if isinstance(mask, Tensor):
            mask = torch.zeros(mask.shape, device=x.device, dtype=rotary[0].dtype).masked_fill(
                ~mask, -torch.inf
            )
        is_token = None if document_ids is None else document_ids >= 0
        x, routings = self.layers(x, rotary, mask, is_token)
        return self.norm(x), routings


def attention_mask(document_ids: Tensor, head_dim: int) -> Tensor | BlockMask:
    """Who may look at whom, (B, 1, T, T): what came before, in the same document.

    A padding position (document -1) sees the padding before it and itself: no softmax is over nothing. On a
    GPU it is a block mask, made here once for all layers.
    """
    if blocks.usable(document_ids.device, head_dim):
        return blocks.document_mask(document_ids)
    same_document = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    return same_document.tril()[:, None]


class MiniMind(nn.Module):
    """The language model. `MiniMind(config)` is randomly initialised; see `initialize`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # tied: one tensor, both names in the state dict
        self.initialize()

    def initialize(self) -> None:
        """Normal(0, 0.02) weights; zero where a branch joins the residual stream.

        Zero output projections make every layer start as the identity, which lets small models take larger
        learning rates from the first step (the "zero init" of Yang et al. 2022, arXiv:2203.03466).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> ModelOutput:
        """Next-token logits.

        Args:
            input_ids: (B, T) token ids.
            position_ids: (B, T) positions for the rotation; by default 0, 1, 2, …
            document_ids: (B, T) numbers that tell packed documents apart, ascending in each row; attention
                stays within equal numbers, and -1 marks padding, at the end. None: one document a row.
            logits_at: (M,) flat indices into the B·T positions whose logits are wanted. The vocabulary
                is the widest product of a small model, so a loss on answers alone asks for those alone.

        Returns: logits (B, T, V), or (M, V) with `logits_at`, and the routing of mixture layers.
        """
        hidden, routing = self.model(input_ids, position_ids, document_ids)
        if logits_at is not None:
            # `index_select`, whose gradient is added up where that of brackets is put value by value.
            hidden = hidden.flatten(0, 1).index_select(0, logits_at)  # (M, H)
        return ModelOutput(self.lm_head(hidden), routing)
