"""Attention within packed documents on a GPU: FlexAttention (Dong et al. 2024, arXiv:2412.05496).

A dense mask is read from memory in every layer and rules out flash attention. This kernel skips the blocks of
128 × 128 scores in which nobody may look, and asks the document ids within the others. It is written in
Triton, and PyTorch compiles it at its first call.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

T = TypeVar("T")
BLOCK = 128
SMALLEST_HEAD = 16  # what the kernel's matrix products take
# Triton builds its launchers with a C compiler. Looked up here, as compiled code cannot ask.
CAN_COMPILE = bool(find_spec("triton")) and any(
    map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
)


def usable(device: torch.device, head_dim: int) -> bool:
    return device.type == "cuda" and CAN_COMPILE and head_dim >= SMALLEST_HEAD


def document_mask(document_ids: Tensor) -> BlockMask:
    """Which blocks of scores to compute, and the rule within them, for `document_ids` (B, T) as in `Batch`.

    Compiled, as otherwise its hundred small operations keep a GPU waiting at the start of each step; and for
    each shape anew: with sizes that may change, PyTorch 2.11 cannot compile it for a GPU ("CantSplit").
    """
    return compiled(mask_of_blocks, dynamic=False)(document_ids)


def mask_of_blocks(document_ids: Tensor) -> BlockMask:
    """`document_mask`, as it is computed.

    The documents of a row stand one after the other, so what a block begins and ends with tells all.
    PyTorch's `create_block_mask` finds out the same from all scores, 33 million for 128 rows of 512.
    """
    length = document_ids.shape[1]

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    padding, beyond = 2**30, 2**30 + 1  # come after the documents
    ids = document_ids.masked_fill(document_ids < 0, padding)
    ids = F.pad(ids, (0, -length % BLOCK), value=beyond).unflatten(1, (-1, BLOCK))  # (B, T / BLOCK, BLOCK)
    first, last = ids[:, None, :, 0], ids[:, None, :, -1]  # (B, 1, T / BLOCK) of blocks of queries or of keys
    places = torch.arange(ids.shape[1], device=ids.device)
    before = places[:, None] > places
    some = before & (first[..., :, None] == last[..., None, :]) | (places[:, None] == places)
    full = before & (last[..., :, None] == first[..., None, :])  # all of both blocks is one document
    blocks = (*in_order(some & ~full), *in_order(full))
    return BlockMask.from_kv_blocks(*blocks, BLOCK, may_look, (length, length))


def in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (B, 1, Q), and which, (B, 1, Q, K), those first."""
    return chosen.sum(dim=-1).int(), chosen.int().argsort(dim=-1, descending=True, stable=True).int()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Softmax attention: query (B, N, T, D) over keys and values (B, K, T, D) → (B, N, T, D)."""
    # Inside a compiled model it becomes part of that; called as it is, it would make all scores.
    flex: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    return flex(query, key, value, block_mask=mask, enable_gqa=True)


@cache
def compiled(function: Callable[..., T], dynamic: bool | None = None) -> Callable[..., T]:
    """Made at the first use: importing the compiler takes seconds that a CPU need not pay."""
    return torch.compile(function, dynamic=dynamic)
