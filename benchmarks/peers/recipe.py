"""The original's recipe: transformers' Llama in fp32, each record cut or padded to the row length, AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.side_by_side import Work
from minimind.config import PRESETS
from minimind.data.records import Kind, read_records
from minimind.export.huggingface import transformers_config
from minimind.tokenizer import Tokenizer


def padded_fp32(preset: str, path: Path, kind: Kind, max_seq_len: int, rows: int, passes: int) -> Work:
    """One optimizer step of `passes` passes of `rows` records; returns its useful tokens."""
    return OriginalRecipe(preset, encoded_records(path, kind), max_seq_len, rows, passes).step


class OriginalRecipe:
    """Its training, step by step. `records` are ids and, for each, 1 if it is to be learned."""

    def __init__(
        self,
        preset: str,
        records: Iterator[tuple[list[int], list[int]]],
        max_seq_len: int,
        rows: int,
        passes: int = 1,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**transformers_config(PRESETS[preset]))
        self.model = AutoModelForCausalLM.from_config(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4)
        self.records, self.shape, self.passes = records, (rows, max_seq_len), passes

    def step(self, scale: float = 1.0) -> int:
        """One optimizer step at `scale` times the learning rate; returns its useful tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = 5e-4 * scale
        useful = 0
        for _ in range(self.passes):
            ids = torch.zeros(self.shape, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row in range(len(ids)):
                tokens, targets = (torch.tensor(part[: self.shape[1]]) for part in next(self.records))
                ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = tokens.where(targets == 1, -100)
                useful += len(tokens) - 1
            loss = self.model(ids, labels=labels).loss / self.passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return useful


def encoded_records(path: Path, kind: Kind) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of each record, and 1 for those to be learned; after the last record the first again."""
    tokenizer = Tokenizer.load()
    while True:
        for _, record in read_records(path, kind):
            if kind == "pretrain":
                ids = tokenizer.encode_document(record.text)
                yield ids, [1] * len(ids)
            else:
                yield tokenizer.encode_chat(record.conversations)
