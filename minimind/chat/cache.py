"""Keys and values of what has been read, for several answers at once, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.chat import kernels
from minimind.chat.tiles import WIDTH
from minimind.config import ModelConfig
from minimind.model import attend

# One layer's attention: queries, keys and values of M new tokens, (M, N + 2K, D) → (M, N, D).
Attention = Callable[[int, Tensor], Tensor]


DTYPES = {"cuda": torch.bfloat16, "cpu": torch.half}  # of keys and values, by the device


def cache_dtype(device: torch.device, weights: str) -> torch.dtype:
    """How keys and values are held beside such weights."""
    return torch.float32 if weights == "fp32" else DTYPES.get(device.type, torch.float32)


def bytes_of_position(config: ModelConfig, device: torch.device, weights: str) -> int:
    """What the keys and values of one token take."""
    width = config.head_dim
    both = width + (blocks_of(width) * WIDTH if device.type == "cpu" else width)
    return (
        config.num_hidden_layers * config.num_key_value_heads * both * cache_dtype(device, weights).itemsize
    )


def blocks_of(length: int) -> int:
    return -(-length // WIDTH)


class Stretch(NamedTuple):
    """Part of one row's prompt, from position `start` on."""

    row: int
    start: int
    ids: Sequence[int]


class KVCache:
    """`rows` answers of up to `max_length` positions each. Rows in use come first: row 0, 1, 2, …"""

    def __init__(
        self, config: ModelConfig, rotation: Tensor, rows: int, max_length: int, dtype: torch.dtype
    ) -> None:
        """`rotation` (positions, D / 2), complex: what turns queries and keys at each position."""
        self.rotation = rotation
        self.max_length = max_length
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


class PackedCache:
    """The same for a CPU, where the loops of `kernels.py` read keys and values as packed matrices.

    Keys are a matrix whose outputs are positions, values one whose inputs are positions (`tiles.Packed`),
    in fp32 or fp16.
    """

    def __init__(
        self, config: ModelConfig, rotation: Tensor, rows: int, max_length: int, dtype: torch.dtype
    ) -> None:
        """`rotation` (positions, D / 2), complex: what turns queries and keys at each position."""
        self.angles = torch.view_as_real(rotation).flatten(1).numpy()  # (positions, D)
        layers, groups, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        held = np.float32 if dtype == torch.float32 else np.uint16
        self.keys = np.zeros((layers, rows, groups, blocks_of(max_length), width, WIDTH), held)
        self.values = np.zeros((layers, rows, groups, blocks_of(width), max_length, WIDTH), held)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        blocks = blocks_of(length)
        self.keys[:, target, :, :blocks] = self.keys[:, source, :, :blocks]
        self.values[:, target, :, :, :length] = self.values[:, source, :, :, :length]

    def one_token_each(self, positions: Sequence[int]) -> PackedAttention:
        """Attention of one new token in each of the first rows, at `positions`, to all before it."""
        return PackedAttention(self, np.arange(len(positions)), np.array(positions))

    def stretches(self, stretches: Sequence[Stretch]) -> PackedAttention:
        """Causal attention of the new tokens of several rows, one stretch after the other."""
        rows = [np.full(len(stretch.ids), stretch.row) for stretch in stretches]
        positions = [stretch.start + np.arange(len(stretch.ids)) for stretch in stretches]
        return PackedAttention(self, np.concatenate(rows), np.concatenate(positions))


class PackedAttention(NamedTuple):
    """An `Attention` whose tokens are in `rows` (M,) at `positions` (M,)."""

    cache: PackedCache
    rows: np.ndarray
    positions: np.ndarray

    def arrays(self, layer: int) -> tuple[np.ndarray, ...]:
        """What the kernels take of it."""
        cache = self.cache
        return cache.angles, cache.keys[layer], cache.values[layer], self.rows, self.positions

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        return torch.from_numpy(kernels.attend(qkv.numpy(), *self.arrays(layer)))
