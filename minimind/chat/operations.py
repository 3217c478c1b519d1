"""The network that answers by PyTorch's operations: on a GPU.

Shapes: M tokens of any rows, B rows, H hidden size, N query heads, K key/value heads, D head width, E
experts, k of them for each token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat.network import Stretch, gate_up_weight, qkv_weight, rotation_table
from minimind.config import ModelConfig
from minimind.lora import merged_weight
from minimind.model import MLP, DecoderLayer, MiniMind, RMSNorm, attend
from minimind.moe import MoE

# One layer's attention: queries, keys and values of M new tokens, (M, N + 2K, D) → (M, N, D).
Attention = Callable[[int, Tensor], Tensor]
Projection = Callable[[Tensor], Tensor]  # (M, I) → (M, O)


class Operations:
    """`model`, which stays as it is, with its weights in fp32 or bf16, which is what `half` means here."""

    def __init__(self, model: MiniMind, weights: str) -> None:
        self.config = model.config
        self.device = model.device
        self.dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        self.embedding = model.model.embed_tokens.weight.to(self.dtype, copy=True)  # (V, H)
        self.rotation = rotation_table(model.model.rotary, self.config.max_position_embeddings)
        self.layers = [Layer(layer, self.config.head_dim, self.dtype) for layer in model.model.layers]
        self.norm = Norm(model.model.norm)
        self.head = projection(merged_weight(model.lm_head), self.dtype)

    @property
    def bytes_of_position(self) -> int:
        config = self.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return numbers * self.dtype.itemsize

    def cache(self, rows: int, max_length: int) -> KVCache:
        return KVCache(self.config, self.rotation, rows, max_length, self.dtype)

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        return self.head(self.norm(self._hidden(ids, cache.one_token_each(positions)))).float()

    @torch.inference_mode()
    def read(self, stretches: Sequence[Stretch], cache: KVCache) -> None:
        self._hidden([token for stretch in stretches for token in stretch.ids], cache.stretches(stretches))

    def _hidden(self, ids: Sequence[int], attention: Attention) -> Tensor:
        """M tokens → (M, H), before the last norm."""
        x = self.embedding[torch.tensor(ids, device=self.device)]  # (M, H)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(x)).unflatten(1, (-1, self.config.head_dim))
            x = x + layer.output(attention(i, qkv).flatten(1))
            x = x + layer.mlp(layer.mlp_norm(x))
        return x


def projection(weight: Tensor, dtype: torch.dtype) -> Projection:
    weight = weight.to(dtype, copy=True)
    return lambda x: F.linear(x, weight)


class Layer:
    def __init__(self, layer: DecoderLayer, head_dim: int, dtype: torch.dtype) -> None:
        self.qkv = projection(qkv_weight(layer.self_attn, head_dim), dtype)
        self.output = projection(merged_weight(layer.self_attn.o_proj), dtype)
        self.attention_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.mlp = Mixture(layer.mlp, dtype) if isinstance(layer.mlp, MoE) else SwiGLU(layer.mlp, dtype)


class Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.clone(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class SwiGLU:
    def __init__(self, mlp: MLP, dtype: torch.dtype) -> None:
        self.gate_up = projection(gate_up_weight(mlp), dtype)
        self.down = projection(merged_weight(mlp.down_proj), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mixture:
    """The experts that a token visits are called by name, and the others' weights are not read.

    The names must come to the host first, a wait in each layer.
    """

    def __init__(self, moe: MoE, dtype: torch.dtype) -> None:
        self.top_k = moe.top_k
        self.gate = moe.gate.weight.float().clone()  # (E, H); the router decides in fp32, as in training
        self.experts = [SwiGLU(expert, dtype) for expert in moe.experts]
        self.shared = [SwiGLU(expert, dtype) for expert in moe.shared_experts]

    def __call__(self, x: Tensor) -> Tensor:
        """x (M, H) → (M, H)."""
        # No matrix product: how that rounds depends on how many rows there are.
        scores, experts = (x.float()[:, None] * self.gate).sum(-1).topk(self.top_k, dim=-1)  # (M, k)
        weights = scores.softmax(-1).to(x.dtype).view(-1, 1)  # (M · k, 1); equals the renormalised softmax
        visits = experts.flatten().tolist()  # the expert of each visit
        out = torch.zeros_like(x)
        for expert in sorted(set(visits)):
            here = [i for i, visited in enumerate(visits) if visited == expert]
            tokens = torch.tensor([i // self.top_k for i in here], device=x.device)
            out.index_add_(0, tokens, self.experts[expert](x[tokens]) * weights[here])
        return sum((shared(x) for shared in self.shared), start=out)


class KVCache:
    """`rows` answers of up to `max_length` positions each."""

    def __init__(
        self, config: ModelConfig, rotation: Tensor, rows: int, max_length: int, dtype: torch.dtype
    ) -> None:
        """`rotation` (positions, D / 2), complex: what turns queries and keys at each position."""
        self.rotation = rotation
        self.groups = config.num_key_value_heads
        shape = (config.num_hidden_layers, rows, 2 * self.groups, max_length, config.head_dim)
        self.buffer = torch.zeros(shape, device=rotation.device, dtype=dtype)  # (L, rows, 2K, S, D)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        self.buffer[:, target, :, :length] = self.buffer[:, source, :, :length]

    def one_token_each(self, positions: Sequence[int]) -> Attention:
        """Attention of one new token in each of the first rows, at `positions`, to all before it."""
        rows, end, device = len(positions), max(positions) + 1, self.buffer.device
        places = torch.tensor(positions, device=device)  # (B,)
        mask = None
        if rows > 1:
            mask = torch.zeros(rows, 1, 1, end, device=device, dtype=self.buffer.dtype)
            mask.masked_fill_(torch.arange(end, device=device) > places.view(-1, 1, 1, 1), -torch.inf)
        heads = torch.arange(rows * 2 * self.groups, device=device)  # (B · 2K,)
        rotation = self.rotation[places]  # (B, D / 2)
        places = places.repeat_interleave(2 * self.groups)  # (B · 2K,)

        def attention(layer: int, qkv: Tensor) -> Tensor:
            query, key_value = self._rotated(qkv, rotation)
            cache = self.buffer[layer, :rows]  # (B, 2K, S, D)
            cache.flatten(0, 1).index_put_((heads, places), key_value.flatten(0, 1))
            # The N / K heads that share keys stand as so many queries: PyTorch's kernel for one query and
            # shared heads takes ten times as long on a CPU.
            query = query.unflatten(1, (self.groups, -1))  # (B, K, N / K, D)
            key, value = cache[:, : self.groups, :end], cache[:, self.groups :, :end]  # (B, K, S, D)
            return F.scaled_dot_product_attention(query, key, value, mask).flatten(1, 2)

        return attention

    def stretches(self, stretches: Sequence[Stretch]) -> Attention:
        """Causal attention of the new tokens of several rows, one stretch after the other."""
        each = [self._stretch(stretch) for stretch in stretches]
        lengths = [len(stretch.ids) for stretch in stretches]

        def attention(layer: int, qkv: Tensor) -> Tensor:
            return torch.cat([own(layer, part) for own, part in zip(each, qkv.split(lengths), strict=True)])

        return attention

    def _stretch(self, stretch: Stretch) -> Attention:
        row, start, length = stretch.row, stretch.start, len(stretch.ids)
        end = start + length
        rotation = self.rotation[start:end]  # (T, D / 2)
        mask = None
        if start:
            allowed = torch.ones(length, end, dtype=torch.bool, device=self.buffer.device).tril(start)
            mask = torch.zeros(1, 1, length, end, device=self.buffer.device, dtype=self.buffer.dtype)
            mask.masked_fill_(~allowed, -torch.inf)

        def attention(layer: int, qkv: Tensor) -> Tensor:
            query, key_value = self._rotated(qkv, rotation)
            cache = self.buffer[layer, row, :, :end]  # (2K, S, D)
            cache[:, start:] = key_value.transpose(0, 1)
            key, value = cache[None].chunk(2, dim=1)  # (1, K, S, D)
            out = attend(query.transpose(0, 1)[None], key, value, mask)  # (1, N, T, D)
            return out[0].transpose(0, 1)

        return attention

    def _rotated(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """qkv (M, N + 2K, D), rotation (M, D / 2) → queries (M, N, D), keys and values (M, 2K, D)."""
        heads = qkv.float()
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))  # (M, N + 2K, D / 2), the same memory
        pairs[:, : -self.groups] *= rotation[:, None]
        query, key_value = heads.to(qkv.dtype).tensor_split((-2 * self.groups,), dim=1)
        return query, key_value
