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
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_HEAD = 16  # what the kernel's matrix products take
# Triton builds its launchers with a C compiler. Looked up here, as compiled code cannot ask.
CAN_COMPILE = bool(find_spec("triton")) and any(
    map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
)


def usable(device: torch.device, head_dim: int) -> bool:
    return device.type == "cuda" and CAN_COMPILE and head_dim >= SMALLEST_HEAD


def document_mask(document_ids: Tensor) -> BlockMask:
    """Which blocks of scores to compute, and the rule within them, for `document_ids` (B, T)."""
    rows, length = document_ids.shape

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    return create_block_mask(may_look, rows, None, length, length, device=document_ids.device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Softmax attention: query (B, N, T, D) over keys and values (B, K, T, D) → (B, N, T, D)."""
    # Inside a compiled model it becomes part of that; called as it is, it would make all scores.
    flex: Any = flex_attention if torch.compiler.is_compiling() else compiled()
    return flex(query, key, value, block_mask=mask, enable_gqa=True)


@cache
def compiled() -> Callable[..., Tensor]:
    """Made at the first use: importing the compiler takes seconds that a CPU need not pay."""
    return torch.compile(flex_attention)
