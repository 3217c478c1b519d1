"""The model made ready to answer: its weights packed once, and the few operations that a new token takes.

The model in `model.py` is written to be read and trained. Here the same network is arranged for one thing,
the next token of a few answers at once: q, k and v are one matrix and so are gate and up, adapters are
merged, rotations are a table, keys and values wait in one block of memory. With one token an operation takes
1 to 10 µs whatever it computes, so that their number counts: eight calls a layer on a CPU, ten in int8
(`kernels.py`).

Shapes: M tokens of any rows, B rows, H hidden size, N query heads, K key/value heads, D head width, E
experts, k of them for each token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat import kernels
from minimind.chat.cache import Attention, KVCache, PackedAttention, PackedCache, Stretch, cache_dtype
from minimind.chat.projections import Pack, projection
from minimind.errors import UserError
from minimind.lora import merged_weight
from minimind.model import MLP, DecoderLayer, MiniMind, RMSNorm, RotaryEmbedding
from minimind.moe import MoE


class InferenceModel:
    """`model`, which stays as it is, with its weights held in one of the ways of `options.WEIGHTS`.

    Raises: UserError for int8 on another device than a CPU.
    """

    @torch.inference_mode()
    def __init__(self, model: MiniMind, weights: str = "half") -> None:
        self.config = model.config
        self.device = model.device
        self.weights = weights
        if weights == "int8" and self.device.type != "cpu":
            raise UserError("--weights int8 is for a CPU; leave it out, or add --device cpu")
        # Activations are few: a CPU loses no time by fp32, and the tensor cores of a GPU want bf16.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" and weights != "fp32" else torch.float32
        pack = partial(projection, kind=weights)
        self.embedding = model.model.embed_tokens.weight.to(self.dtype, copy=True)  # (V, H)
        self.rotation = rotation_table(model.model.rotary, self.config.max_position_embeddings)
        self.layers = [Layer(layer, self.config.head_dim, pack) for layer in model.model.layers]
        self.norm = Norm(model.model.norm)
        self.head = pack(merged_weight(model.lm_head))

    def cache(self, rows: int, max_length: int) -> KVCache | PackedCache:
        kind = PackedCache if self.device.type == "cpu" else KVCache
        return kind(self.config, self.rotation, rows, max_length, cache_dtype(self.device, self.weights))

    @torch.inference_mode()
    def next_logits(
        self, ids: Sequence[int], positions: Sequence[int], cache: KVCache | PackedCache
    ) -> Tensor:
        """Feed a token to each of the first B rows of the cache: what may follow it, (B, V) in fp32."""
        return self.head(self.norm(self._hidden(ids, cache.one_token_each(positions)))).float()

    @torch.inference_mode()
    def read(self, stretches: Sequence[Stretch], cache: KVCache | PackedCache) -> None:
        """Take in stretches of the prompts of different rows."""
        self._hidden([token for stretch in stretches for token in stretch.ids], cache.stretches(stretches))

    def _hidden(self, ids: Sequence[int], attention: Attention | PackedAttention) -> Tensor:
        """M tokens → (M, H), before the last norm."""
        if self.device.type == "cpu":
            kernels.share_threads()
        x = self.embedding[torch.tensor(ids, device=self.device)]  # (M, H)
        if isinstance(attention, PackedAttention) and not self.config.num_experts:
            return self._by_kernels(x, attention)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(x)).unflatten(1, (-1, self.config.head_dim))
            x = x + layer.output(attention(i, qkv).flatten(1))
            x = x + layer.mlp(layer.mlp_norm(x))
        return x

    def _by_kernels(self, x: Tensor, attention: PackedAttention) -> Tensor:
        """The same with one call for each layer."""
        hidden = x.numpy()
        for i, layer in enumerate(self.layers):
            hidden = kernels.layer(hidden, *attention.arrays(i), layer.weights)
        return torch.from_numpy(hidden)


class Layer:
    def __init__(self, layer: DecoderLayer, head_dim: int, pack: Pack) -> None:
        attention = layer.self_attn
        q, k = (interleave(merged_weight(p), head_dim) for p in (attention.q_proj, attention.k_proj))
        self.qkv = pack(torch.cat((q, k, merged_weight(attention.v_proj))))
        self.output = pack(merged_weight(attention.o_proj))
        self.attention_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.mlp = Mixture(layer.mlp, pack) if isinstance(layer.mlp, MoE) else SwiGLU(layer.mlp, pack)

    @cached_property
    def weights(self) -> kernels.LayerWeights:
        """What `kernels.layer` takes of a layer without experts."""
        norm, mlp_norm = self.attention_norm, self.mlp_norm
        matrices = (p.matrix for p in (self.qkv, self.output, self.mlp.gate_up, self.mlp.down))
        return kernels.LayerWeights(norm.eps, norm.weight.numpy(), mlp_norm.weight.numpy(), *matrices)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Order a head's outputs 0, D/2, 1, D/2 + 1, …: what rotates together then stands together.

    It can be read as a complex number, and its rotation is one multiplication. Scores are the same, since
    queries and keys are reordered alike.
    """
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rotation_table(rotary: RotaryEmbedding, positions: int) -> Tensor:
    """scale · exp(i · angle) of every position, complex (positions, D / 2)."""
    places = torch.arange(positions, device=rotary.frequencies.device)
    angles = places[:, None].float() * rotary.frequencies.float()
    return torch.polar(torch.full_like(angles, rotary.scale), angles)


class Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.clone(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return torch.from_numpy(kernels.rms_norm(x.numpy(), self.weight.numpy(), self.eps))
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class SwiGLU:
    def __init__(self, mlp: MLP, pack: Pack) -> None:
        self.gate_up = pack(torch.cat((merged_weight(mlp.gate_proj), merged_weight(mlp.up_proj))))
        self.down = pack(merged_weight(mlp.down_proj))

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if x.device.type == "cpu":
            return self.down(torch.from_numpy(kernels.swiglu(gate_up.numpy())))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mixture:
    """The experts that a token visits are called by name, and the others' weights are not read.

    On a GPU the names must come to the host first, a wait in each layer.
    """

    def __init__(self, moe: MoE, pack: Pack) -> None:
        self.top_k = moe.top_k
        self.gate = moe.gate.weight.float().clone()  # (E, H); the router decides in fp32, as in training
        self.experts = [SwiGLU(expert, pack) for expert in moe.experts]
        self.shared = [SwiGLU(expert, pack) for expert in moe.shared_experts]

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
