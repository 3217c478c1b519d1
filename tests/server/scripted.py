"""A model that says what a test wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from chat.models import random_model

from minimind.chat.engine import Engine
from minimind.chat.inference import InferenceModel
from minimind.server.answers import Served
from minimind.tokenizer import Tokenizer

from .live import CONFIG

END = 2


class Scripted(InferenceModel):
    """Every answer is `script`, and then the end; for one row, one request after another."""

    def __init__(self) -> None:
        super().__init__(random_model(CONFIG), "fp32")
        self.script: Sequence[int] = []
        self.following = (-1, 0)  # the position that goes on with the answer, and its place in the script

    def next_logits(self, ids, positions, cache):
        (position,) = positions
        place = self.following[1] if position == self.following[0] else 0
        self.following = position + 1, place + 1
        logits = torch.full((1, self.config.vocab_size), -10.0)
        logits[0, [*self.script, END][min(place, len(self.script))]] = 50.0
        return logits

    def served(self, name: str, stage: str) -> Served:
        return Served(name, stage, None, 0, Engine(self, 1, 512))


def bytes_as_tokens(text: str) -> list[int]:
    """One token a byte: every Chinese character and emoji is split."""
    table = Tokenizer.load().token_bytes
    return [table.index(bytes([byte])) for byte in text.encode()]
