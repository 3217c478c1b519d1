"""The network that answers by loops over packed matrices: on a CPU.

Shapes: M tokens of any rows, B rows, H hidden size, K key/value heads, D head width, S positions, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat import decoder
from minimind.chat.kernels import share_threads
from minimind.chat.network import Stretch, gate_up_weight, qkv_weight, rotation_table
from minimind.chat.tiles import HALVES, WIDTH, ZERO, Packed
from minimind.chat.vectors import MOST
from minimind.config import ModelConfig
from minimind.lora import merged_weight
from minimind.model import MLP, DecoderLayer, MiniMind
from minimind.moe import MoE

Pack = Callable[[Tensor], Packed]


class PackedNetwork:
    """`model`, which stays as it is, with its weights held as PACKS has it."""

    def __init__(self, model: MiniMind, weights: str) -> None:
        pack = PACKS[weights]
        self.config = model.config
        self.held = np.uint16 if HALVES and weights != "fp32" else np.float32  # keys and values; bits of fp16
        self.embedding = model.model.embed_tokens.weight.float().clone().numpy()  # (V, H)
        rotation = rotation_table(model.model.rotary, self.config.max_position_embeddings)
        self.weights = decoder.Weights(
            torch.view_as_real(rotation).flatten(1).numpy(),
            stacked([layer_weights(layer, self.config.head_dim, pack) for layer in model.model.layers]),
            model.model.norm.weight.clone().numpy(),
            pack(merged_weight(model.lm_head)),
        )

    @property
    def bytes_of_position(self) -> int:
        config = self.config
        numbers = config.head_dim + blocks_of(config.head_dim) * WIDTH  # of a key, of a value
        return config.num_hidden_layers * config.num_key_value_heads * numbers * np.dtype(self.held).itemsize

    def cache(self, rows: int, max_length: int) -> PackedCache:
        return PackedCache(self.config, rows, max_length, self.held)

    def next_logits(self, ids: Sequence[int], positions: Sequence[int], cache: PackedCache) -> Tensor:
        return torch.from_numpy(self._run(ids, np.arange(len(ids)), np.array(positions), cache, True))

    def read(self, stretches: Sequence[Stretch], cache: PackedCache) -> None:
        ids = [token for stretch in stretches for token in stretch.ids]
        rows = np.concatenate([np.full(len(stretch.ids), stretch.row) for stretch in stretches])
        positions = np.concatenate([stretch.start + np.arange(len(stretch.ids)) for stretch in stretches])
        self._run(ids, rows, positions, cache, False)

    def _run(
        self, ids: Sequence[int], rows: np.ndarray, positions: np.ndarray, cache: PackedCache, wanted: bool
    ) -> np.ndarray:
        share_threads()
        x = self.embedding.take(ids, 0)  # here, since a loop would not notice an id that there is not
        return decoder.run(x, self.weights, cache.keys, cache.values, rows, positions, wanted)


def stacked(parts: Sequence[Any]) -> Any:
    """Weights of several layers or experts, all alike, as one: arrays have one dimension more, the first."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return torch.stack([torch.from_numpy(part) for part in parts]).numpy()  # to whole lines of a cache
    return type(first)(*map(stacked, zip(*parts, strict=True))) if isinstance(first, tuple) else first


def layer_weights(layer: DecoderLayer, head_dim: int, pack: Pack) -> decoder.LayerWeights:
    norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
    return decoder.LayerWeights(
        norm.eps,
        norm.weight.clone().numpy(),
        mlp_norm.weight.clone().numpy(),
        pack(qkv_weight(layer.self_attn, head_dim)),
        pack(merged_weight(layer.self_attn.o_proj)),
        mixture_weights(layer.mlp, pack) if isinstance(layer.mlp, MoE) else mlp_weights(layer.mlp, pack),
    )


def mlp_weights(mlp: MLP, pack: Pack) -> decoder.MLPWeights:
    return decoder.MLPWeights(pack(gate_up_weight(mlp)), pack(merged_weight(mlp.down_proj)))


def mixture_weights(moe: MoE, pack: Pack) -> decoder.MixtureWeights:
    experts = (*moe.experts, *moe.shared_experts)
    # The router decides in fp32, as in training.
    gate = moe.gate.weight.float().clone().numpy()
    return decoder.MixtureWeights(moe.top_k, gate, stacked([mlp_weights(expert, pack) for expert in experts]))


class PackedCache:
    """Keys and values of `rows` answers of up to `max_length` positions each.

    To each row and group keys are a packed matrix whose outputs are positions, values one whose inputs are.
    """

    def __init__(self, config: ModelConfig, rows: int, max_length: int, held: type) -> None:
        layers, groups, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys: np.ndarray = np.zeros((layers, rows, groups, blocks_of(max_length), width, WIDTH), held)
        self.values: np.ndarray = np.zeros((layers, rows, groups, blocks_of(width), max_length, WIDTH), held)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        blocks = blocks_of(length)
        self.keys[:, target, :, :blocks] = self.keys[:, source, :, :blocks]
        self.values[:, target, :, :, :length] = self.values[:, source, :, :, :length]


def blocks_of(length: int) -> int:
    return -(-length // WIDTH)


def full(weight: Tensor) -> Packed:
    """fp32, as the model was trained."""
    return in_floats(weight.float())


def half(weight: Tensor) -> Packed:
    """fp16, as weight files store them. Multiplied in fp32, they lose nothing more."""
    if not HALVES:
        return full(weight)
    return in_floats(weight.clamp(-MOST, MOST).half().view(torch.uint16))


def in_floats(weight: Tensor) -> Packed:
    blocks = in_blocks(weight).transpose(1, 2).contiguous()  # (B, I, WIDTH)
    return Packed(len(weight), blocks.numpy())


def int8(weight: Tensor) -> Packed:
    """8 bits a weight, with one scale for each output; inputs are rounded too, with one step for each row.

    Their products are summed as integers, exactly. Absolute maxima as scales: Dettmers et al. 2022,
    arXiv:2208.07339, 2.1.
    """
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (O,)
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    blocks = in_blocks(F.pad(rounded, (0, -weight.shape[1] % 4)))  # (B, WIDTH, I)
    start = -ZERO * blocks.sum(2, dtype=torch.int32)  # inputs have ZERO added
    fours = blocks.unflatten(2, (-1, 4)).transpose(1, 2).contiguous()  # (B, I / 4, WIDTH, 4)
    return Packed(len(weight), fours.numpy(), start.numpy(), in_blocks(scale).numpy())


def in_blocks(weight: Tensor) -> Tensor:
    """(O, …) → (B, WIDTH, …), with zeros at the end."""
    filled = F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, -len(weight) % WIDTH))
    return filled.unflatten(0, (-1, WIDTH))


PACKS: dict[str, Callable[[Tensor], Packed]] = {"fp32": full, "half": half, "int8": int8}
