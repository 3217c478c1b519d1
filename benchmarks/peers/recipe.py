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
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**transformers_config(PRESETS[preset])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    records = encoded_records(path, kind)

    def step() -> int:
        useful = 0
        for _ in range(passes):
            ids = torch.zeros(rows, max_seq_len, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for row in range(rows):
                tokens, targets = (torch.tensor(part[:max_seq_len]) for part in next(records))
                ids[row, : len(tokens)] = tokens
                labels[row, : len(tokens)] = tokens.where(targets == 1, -100)
                useful += len(tokens) - 1
            loss = model(ids, labels=labels).loss / passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return useful

    return step


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
