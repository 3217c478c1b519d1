"""`minimind eval bpb`: bits per byte of any data file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.errors import UserError
from minimind.evaluate.options import EvalOptions, Loaded, progress_bar, say
from minimind.flags import REQUIRED, flag, parse_flags

if TYPE_CHECKING:
    from minimind.data.records import Kind


@dataclass(frozen=True)
class BpbOptions(EvalOptions):
    files: tuple[Path, ...] = flag(REQUIRED, "JSONL files in any of the formats of training", positional=True)
    batch_size: int = flag(8, "rows of max_seq_len tokens at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; it must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Bits per byte: how well a model predicts the texts of JSONL files.

    Of conversations the answers count, of pairs both answers. Fewer is better; a text that was trained on is
    no test. Files may be gzipped.

        minimind eval bpb dataset/pretrain_val.jsonl --model_mode 0
        minimind eval bpb dataset/dpo.jsonl dataset/r1_mix_1024.jsonl --json out/bpb.json
    """
    options = parse_flags(BpbOptions, argv, inspect.getdoc(main))
    from minimind.data.records import kind_of

    kinds = [kind_of(path) for path in options.files]
    loaded = options.load()
    found = [
        score_file(path, kind, loaded, options.batch_size)
        for path, kind in zip(options.files, kinds, strict=True)
    ]
    options.write_json(loaded, {"bits_per_byte": found})
    return 0


def score_file(path: Path, kind: Kind, loaded: Loaded, batch_size: int) -> dict[str, Any]:
    """Score one file and print what it gives; Ctrl-C passes on after saying how far it got."""
    from minimind.data.prepare import prepare
    from minimind.evaluate.bits_per_byte import bits_per_byte
    from minimind.train.datasets import rows_of

    store = prepare(path, kind, loaded.tokenizer)
    data = rows_of(store, loaded.tokenizer, loaded.max_seq_len)
    if not data.num_rows:
        raise UserError(f"{path}: no record fits into --max_seq_len {loaded.max_seq_len}; raise it")
    rows = 0

    def count(more: int) -> None:
        nonlocal rows
        rows += more
        show(rows)

    try:
        with progress_bar(path.name, data.num_rows) as show:
            score = bits_per_byte(
                loaded.model, data, loaded.tokenizer, loaded.parallel, batch_size, progress=count
            )
    except KeyboardInterrupt:
        say(f"stopped after {rows:,} of {data.num_rows:,} rows of {path}")
        raise
    print(
        f"{path}: {score.bits_per_byte:.4f} bits per byte (loss {score.loss:.4f} a token, "
        f"{score.tokens:,} tokens, {score.bytes:,} bytes)",
        flush=True,
    )
    report = data.report
    if report.cut or report.dropped:
        say(
            f"{path}: of {report.documents:,} records {report.cut + report.dropped:,} are longer than "
            f"--max_seq_len {loaded.max_seq_len}: {report.cut:,} count in part, {report.dropped:,} not at all"
        )
    source = {"file": str(path), "sha256": store.meta["content_sha256"], "kind": kind}
    return source | score._asdict()
