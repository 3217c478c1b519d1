"""The rows a run trains on, and those it is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind.data.batches import PackedDataset, PairDataset
from minimind.data.holdout import split_holdout
from minimind.data.prepare import prepare
from minimind.data.records import Kind
from minimind.data.segments import Documents
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer
from minimind.train.options import TrainOptions


@dataclass(frozen=True)
class Datasets:
    training: PackedDataset
    held_out: PackedDataset | None  # None where there is nothing to hold out
    content_sha256: str  # of the training file


def load_datasets(
    kind: Kind, options: TrainOptions, tokenizer: Tokenizer, progress: bool, tag_weight: float = 1.0
) -> Datasets:
    """Tokenise `data_path` (or find its tokens in the cache) and set apart what is evaluated on.

    Raises: UserError when a file is missing or broken, or holds nothing that fits `max_seq_len`.
    """

    def tokens_of(path: Path) -> TokenStore:
        return prepare(
            path,
            kind,
            tokenizer,
            on_bad_record=options.on_bad_record,
            num_workers=options.num_workers,
            progress=progress,
        )

    def rows(store: TokenStore, documents: Documents | None = None) -> PackedDataset:
        return rows_of(store, tokenizer, options.max_seq_len, options.seed, documents, tag_weight)

    assert options.data_path is not None  # every stage has one
    if options.data_path.is_dir():
        raise UserError(f"--data_path {options.data_path} is a folder; name one JSONL file in it")
    if not options.data_path.is_file():
        raise UserError(
            f"there is no data at {options.data_path}; put a JSONL file there (dataset/README.md shows "
            "the formats), name another with --data_path, or try `make demo`, which makes its own"
        )
    store = tokens_of(options.data_path)
    if options.eval_path:
        training, held_out = rows(store), rows(tokens_of(options.eval_path))
    else:
        kept, held = split_holdout(store)
        training, held_out = rows(store, kept), rows(store, held)
    for path, data in ((options.data_path, training), (options.eval_path, held_out)):
        if path and not data.num_rows:
            raise UserError(f"{path}: no record fits into --max_seq_len {options.max_seq_len}; raise it")
    return Datasets(training, held_out if held_out.num_rows else None, store.meta["content_sha256"])


def rows_of(
    store: TokenStore,
    tokenizer: Tokenizer,
    max_seq_len: int,
    seed: int = 0,
    documents: Documents | None = None,
    tag_weight: float = 1.0,
) -> PackedDataset:
    """`store` as rows of `max_seq_len` positions; see `PackedDataset`."""
    dataset = PairDataset if store.kind == "preference" else PackedDataset
    return dataset(
        store,
        max_seq_len,
        seed=seed,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        documents=documents,
        tag_weight=tag_weight,
    )
