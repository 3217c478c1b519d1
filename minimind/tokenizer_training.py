"""`minimind tokenizer`: a byte-level BPE vocabulary from text files, as `Tokenizer.load` reads it."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minimind.chat_template import CHAT_TEMPLATE
from minimind.data.lines import BadRecord, no_records, read_lines
from minimind.data.records import (
    KINDS,
    AskedKind,
    InvalidLine,
    OnBadRecord,
    decode_text,
    kind_of,
    read_records,
    text_of,
)
from minimind.errors import UserError
from minimind.files import check_writable, write_text
from minimind.flags import REQUIRED, flag, parse_flags
from minimind.paths import OUT_DIR
from minimind.tokenizer import CONTROL_TOKENS, TRANSFORMERS_CONFIG, WORD, Tokenizer

MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + 256
MAX_VOCAB_SIZE = 1_000_000  # far more than any model has; memory is taken for each


@dataclass(frozen=True)
class TokenizerOptions:
    files: tuple[Path, ...] = flag(
        REQUIRED, ".jsonl or .txt, plain or .gz; given twice weighs twice", positional=True
    )
    vocab_size: int = flag(6400, f"entries, at least {MIN_VOCAB_SIZE}: 3 control tokens and 256 bytes")
    out_dir: Path = flag(OUT_DIR / "tokenizer", "folder of the tokenizer; one that is there is replaced")
    max_mb: float = flag(50.0, "sample the files down to about this many megabytes of text")
    kind: AskedKind = flag("auto", "what records are; auto is told from a file's first", choices=KINDS)
    on_bad_record: OnBadRecord = flag("stop", "what to do about a broken record", choices=("stop", "skip"))

    def __post_init__(self) -> None:
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(f"--vocab_size {self.vocab_size} is too large; at most {MAX_VOCAB_SIZE:,}")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"--vocab_size {self.vocab_size} is too small: 3 control tokens and 256 bytes need "
                f"{MIN_VOCAB_SIZE}"
            )
        if not 1e-3 <= self.max_mb < math.inf:  # refuses NaN too
            raise UserError(f"--max_mb {self.max_mb:g} leaves nothing to train on: give a positive number")

    def texts(self, path: Path, bad_records: list[BadRecord] | None = None) -> Iterator[str]:
        """What one of the files says; see `read_texts`."""
        return read_texts(path, self.kind, self.on_bad_record, bad_records)


def train_tokenizer(options: TokenizerOptions, bad_records: list[BadRecord] | None = None) -> Tokenizer:
    """Train a byte-level BPE on text files and write a directory that `Tokenizer.load` and transformers read.

    It reads only every k-th record when the files hold more than `max_mb` of text, because memory and time
    grow with the number of different words: 50 MB of Chinese take 3 GB and about 80 CPU-seconds, and are
    plenty for 6,400 entries. A tiny corpus may give fewer than `vocab_size`.

    The result depends on nothing but the options and the files. Records are streamed.

    Args: bad_records: takes those that were left out.
    Raises:
        UserError: a file is missing, empty or malformed, or `out_dir` cannot be written.
    """
    stride = _stride(options)
    check_writable(options.out_dir)  # before the long work, not after it
    texts = (
        text
        for path in options.files
        for text in itertools.islice(options.texts(path, bad_records), 0, None, stride)
    )

    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    vocabulary.train_from_iterator(texts, trainer)
    return _write_tokenizer(vocabulary, options.out_dir)


def read_texts(
    path: Path,
    kind: AskedKind = "auto",
    on_bad_record: OnBadRecord = "stop",
    bad_records: list[BadRecord] | None = None,
) -> Iterator[str]:
    """The texts of a training file: each line of a `.txt`, else all that each record says.

    Args: on_bad_record and bad_records: see `read_records`.
    Raises:
        UserError: the file cannot be read, holds nothing, or a line is not a record, which is named.
    """
    if ".txt" in path.suffixes:
        yield from _plain_texts(path, on_bad_record, bad_records)
        return
    records = read_records(path, kind_of(path, kind), on_bad_record=on_bad_record, bad_records=bad_records)
    for _, record in records:
        yield text_of(record)


def _plain_texts(
    path: Path, on_bad_record: OnBadRecord, bad_records: list[BadRecord] | None
) -> Iterator[str]:
    empty = True
    for item in read_lines(path):
        text = item if isinstance(item, BadRecord) else _plain_text(path, *item)
        if isinstance(text, str):
            yield text
            empty = False
        elif on_bad_record == "stop" and not text.used:
            raise text.stop()
        elif bad_records is not None:
            bad_records.append(text)
    if empty:
        raise no_records(path)


def _plain_text(path: Path, number: int, line: bytes) -> str | BadRecord:
    try:
        return decode_text(line).rstrip("\r")
    except InvalidLine as error:
        return BadRecord(str(path), number, error.field, error.reason)


def _stride(options: TokenizerOptions) -> int:
    """k, such that every k-th record is about `max_mb` of text in all. Gzip shrinks text to about 2/5."""
    megabytes = 0.0
    for path in options.files:
        next(options.texts(path))  # what cannot be read is said before the long work
        megabytes += path.stat().st_size / 1e6 * (2.5 if path.suffix == ".gz" else 1)
    return max(1, math.ceil(megabytes / options.max_mb))


def _write_tokenizer(vocabulary: tokenizers.Tokenizer, out_dir: Path) -> Tokenizer:
    """The vocabulary last: the other files are the same for all, so a folder that has it is whole."""
    write_text(out_dir / "tokenizer_config.json", json.dumps(TRANSFORMERS_CONFIG, indent=2) + "\n")
    write_text(out_dir / "chat_template.jinja", CHAT_TEMPLATE)
    write_text(out_dir / "tokenizer.json", vocabulary.to_str(pretty=True))
    return Tokenizer.load(out_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a tokenizer and say how well it compresses.

    Every other command takes its folder with --tokenizer_path.

        minimind tokenizer dataset/pretrain_hq.jsonl --vocab_size 6400 --out_dir out/tokenizer
    """
    options = parse_flags(TokenizerOptions, argv, inspect.getdoc(main))
    files = f"{len(options.files)} file(s)"
    print(f"training a tokenizer of {options.vocab_size:,} entries on {files}", flush=True)
    start = time.perf_counter()
    bad_records: list[BadRecord] = []
    tokenizer = train_tokenizer(options, bad_records)
    seconds = time.perf_counter() - start
    left_out = [bad for bad in bad_records if not bad.used]
    if left_out:
        print(f"{len(left_out):,} bad records left out; the first: {left_out[0]}")
    sample = [text for path in options.files for text in itertools.islice(options.texts(path), 500)]
    ratio = sum(map(len, sample)) / sum(map(len, tokenizer.encode_batch(sample)))
    entries = f"{tokenizer.vocab_size:,} entries"
    print(f"wrote {options.out_dir}: {entries}, {ratio:.3f} characters per token, {seconds:.0f} s")
    return 0
