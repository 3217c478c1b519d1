"""The model made ready to answer: its weights laid out once, and the few operations that a new token takes.

The model in `model.py` is written to be read and trained. Here the same network is arranged for one thing,
the next token of a few answers at once: q, k and v are one matrix and so are gate and up, adapters are
merged, rotations are a table, keys and values wait in one block of memory. It is there twice: for a CPU in
loops and packed matrices (`packed.py`), for other devices in PyTorch's operations (`operations.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind.chat.network import Cache, Network, Stretch
from minimind.chat.operations import Operations
from minimind.chat.packed import PackedNetwork
from minimind.errors import UserError
from minimind.model import MiniMind


class InferenceModel:
    """`model`, which stays as it is, with its weights held in one of the ways of `options.WEIGHTS`.

    Raises: UserError for int8 on another device than a CPU.
    """

    @torch.inference_mode()
    def __init__(self, model: MiniMind, weights: str = "half") -> None:
        self.config = model.config
        self.device = model.device
        if weights == "int8" and self.device.type != "cpu":
            raise UserError("--weights int8 is for a CPU; leave it out, or add --device cpu")
        kind = PackedNetwork if self.device.type == "cpu" else Operations
        self.network: Network = kind(model, weights)

    def cache(self, rows: int, max_length: int) -> Cache:
        """Memory for the keys and values of `rows` answers of up to `max_length` positions each."""
        return self.network.cache(rows, max_length)

    def next_logits(self, ids: Sequence[int], positions: Sequence[int], cache: Cache) -> Tensor:
        """Feed a token to each of the first B rows of the cache: what may follow it, (B, V) in fp32."""
        return self.network.next_logits(ids, positions, cache)

    def read(self, stretches: Sequence[Stretch], cache: Cache) -> None:
        """Take in stretches of the prompts of different rows."""
        self.network.read(stretches, cache)
