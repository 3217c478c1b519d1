"""What users of `datasets` write to turn a JSONL file into rows of one length, as fast as it goes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.paths import TOKENIZER_DIR

if TYPE_CHECKING:
    from datasets import Dataset

Encode = Callable[[list[str]], list[list[int]]]
BOS, EOS = 1, 2


def datasets_rows(path: Path, max_seq_len: int, kind: str, num_proc: int | None) -> Callable[[Path], Dataset]:
    """From the file to rows, with the cache in the folder that is given.

    Without `num_proc` this process does all, and the tokenizer alone works on all cores.
    """
    encode = encoder(kind)

    def rows(cache: Path) -> Dataset:
        return joined_and_cut(tokenised(path, encode, cache, num_proc), max_seq_len, num_proc)

    return rows


def encoder(kind: str) -> Encode:
    """By `transformers`, as most do it, or by the `tokenizers` object inside it alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    if kind == "transformers":
        return lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
    inside = tokenizer.backend_tokenizer
    return lambda texts: [
        encoding.ids for encoding in inside.encode_batch_fast(texts, add_special_tokens=False)
    ]


def tokenised(path: Path, encode: Encode, cache: Path, num_proc: int | None) -> Dataset:
    """Every text between <|im_start|> and <|im_end|>."""
    import datasets

    datasets.disable_progress_bars()
    texts = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    return texts.map(
        lambda batch: {"input_ids": [[BOS, *ids, EOS] for ids in encode(batch["text"])]},
        batched=True,
        num_proc=num_proc,
        remove_columns=texts.column_names,
    )


def joined_and_cut(tokens: Dataset, max_seq_len: int, num_proc: int | None) -> Dataset:
    """Documents one after the other, cut where a row is full; the rest of each batch is lost."""

    def rows(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        starts = range(0, len(ids) - len(ids) % max_seq_len, max_seq_len)
        return {"input_ids": [ids[start : start + max_seq_len] for start in starts]}

    return tokens.map(rows, batched=True, num_proc=num_proc)
