"""`minimind tokenizer`: a byte-level BPE vocabulary from text files, as `Tokenizer.load` reads it."""

from __future__ import annotations

import argparse
import gzip
import inspect
import itertools
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minimind.chat_template import CHAT_TEMPLATE
from minimind.errors import UserError
from minimind.flags import parser_settings
from minimind.tokenizer import CONTROL_TOKENS, TRANSFORMERS_CONFIG, WORD, Tokenizer, replace_surrogates

MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + 256


def train_tokenizer(
    files: Sequence[str | Path],
    vocab_size: int = 6400,
    out_dir: str | Path = "out/tokenizer",
    max_mb: float = 50,
) -> Tokenizer:
    """Train a byte-level BPE on text files and write a directory that `Tokenizer.load` and transformers read.

    Args:
        files: `.txt` (one text a line) or `.jsonl` in any of the project's formats, gzipped or not. A file
            that is given twice weighs twice.
        vocab_size: entries, the 3 control tokens and 256 bytes included. A tiny corpus may give fewer.
        out_dir: created if it is missing; its tokenizer files are replaced.
        max_mb: read only every k-th record when the files hold more than this many megabytes of text, because
            memory and time grow with the number of different words: 50 MB of Chinese take 3 GB and about 80
            CPU-seconds, and are plenty for 6,400 entries.

    The result depends on nothing but the arguments and the files. Records are streamed.

    Raises:
        UserError: a file is missing, empty or malformed, or `vocab_size` is below 259, or
            `out_dir` cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 3 control tokens and 256 bytes need {MIN_VOCAB_SIZE}"
        )
    paths = [Path(file) for file in files]
    stride = _stride(paths, max_mb)
    _make_directory(Path(out_dir))  # before the long work, not after it
    texts = (text for path in paths for text in itertools.islice(read_texts(path), 0, None, stride))

    vocabulary = tokenizers.Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    vocabulary.train_from_iterator(texts, trainer)
    return _write_tokenizer(vocabulary, Path(out_dir))


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a training file: each line of a `.txt`; a record's "text" or all its message contents.

    Raises:
        UserError: the file cannot be read, or a line is not a record; the message names the line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    is_jsonl = ".jsonl" in path.suffixes
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record_text(line, f"{path}:{number}") if is_jsonl else line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}. Give .jsonl or .txt files in UTF-8.") from None


def _record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
        if "text" in record:
            return replace_surrogates(record["text"])
        keys = [key for key in ("conversations", "chosen", "rejected") if key in record]
        text = "\n".join(message["content"] for key in keys for message in record[key])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where} is not a record that training reads ({error!r}); see dataset/README.md"
        ) from None
    if not keys:
        raise UserError(
            f'{where} has no "text", "conversations", "chosen" or "rejected"; see dataset/README.md'
        )
    return replace_surrogates(text)


def _stride(paths: Sequence[Path], max_mb: float) -> int:
    """k, such that every k-th record is about `max_mb` of text in all. Gzip shrinks text to about 2/5."""
    if not 1e-3 <= max_mb < math.inf:  # refuses NaN too
        raise UserError(f"--max_mb {max_mb:g} leaves nothing to train on: give a positive number")
    megabytes = 0.0
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist: give .jsonl or .txt files to train on")
        if next(read_texts(path), None) is None:
            raise UserError(f"{path} is empty: give files with text to train on")
        megabytes += path.stat().st_size / 1e6 * (2.5 if path.suffix == ".gz" else 1)
    return max(1, math.ceil(megabytes / max_mb))


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path} ({error.strerror}): give another --out_dir") from None


def _write_tokenizer(vocabulary: tokenizers.Tokenizer, out_dir: Path) -> Tokenizer:
    vocabulary.save(str(out_dir / "tokenizer.json"))
    (out_dir / "tokenizer_config.json").write_text(json.dumps(TRANSFORMERS_CONFIG, indent=2) + "\n")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Tokenizer.load(out_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a tokenizer and say how well it compresses.

    Every other command takes its folder with --tokenizer_path.

        minimind tokenizer dataset/pretrain_hq.jsonl --vocab_size 6400 --out_dir out/tokenizer
    """
    parser = argparse.ArgumentParser(**parser_settings(inspect.getdoc(main)))
    parser.add_argument(
        "files", nargs="+", type=Path, help=".jsonl or .txt, optionally .gz; given twice weighs twice"
    )
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--out_dir", default="out/tokenizer")
    parser.add_argument(
        "--max_mb", type=float, default=50, help="sample the files down to about this much text"
    )
    args = parser.parse_args(argv)

    print(f"training a tokenizer of {args.vocab_size:,} entries on {len(args.files)} file(s)", flush=True)
    start = time.perf_counter()
    tokenizer = train_tokenizer(args.files, args.vocab_size, args.out_dir, args.max_mb)
    seconds = time.perf_counter() - start
    sample = [text for file in args.files for text in itertools.islice(read_texts(Path(file)), 500)]
    ratio = sum(map(len, sample)) / sum(map(len, tokenizer.encode_batch(sample)))
    entries = f"{tokenizer.vocab_size:,} entries"
    print(f"wrote {args.out_dir}: {entries}, {ratio:.3f} characters per token, {seconds:.0f} s")
    return 0
