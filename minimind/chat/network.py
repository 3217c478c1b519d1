"""What the two ways in which a model answers share: their interface, and how weights are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minimind.lora import merged_weight
from minimind.model import MLP, Attention, RotaryEmbedding


class Stretch(NamedTuple):
    """Part of one row's prompt, from position `start` on."""

    row: int
    start: int
    ids: Sequence[int]


class Cache(Protocol):
    """Keys and values of what has been read. Rows in use come first: row 0, 1, 2, …"""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""


class Network(Protocol):
    """As `InferenceModel` has these, each for caches of its own kind."""

    @property
    def bytes_of_position(self) -> int:
        """What a cache takes for one token."""

    def cache(self, rows: int, max_length: int) -> Cache: ...

    def next_logits(self, ids: Sequence[int], positions: Sequence[int], cache: Any) -> Tensor: ...

    def read(self, stretches: Sequence[Stretch], cache: Any) -> None: ...


def qkv_weight(attention: Attention, head_dim: int) -> Tensor:
    """Queries, keys and values by one product: ((N + 2K) · D, H)."""
    q, k = (interleave(merged_weight(p), head_dim) for p in (attention.q_proj, attention.k_proj))
    return torch.cat((q, k, merged_weight(attention.v_proj)))


def gate_up_weight(mlp: MLP) -> Tensor:
    """Both by one product: (2I, H)."""
    return torch.cat((merged_weight(mlp.gate_proj), merged_weight(mlp.up_proj)))


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
