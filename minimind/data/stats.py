"""What a data file consists of: lengths, languages, turns, copies, and the rows that training packs it into.

    minimind data stats dataset/sft_mini_512.jsonl               with a picture of the lengths in out/stats/
    minimind data stats dataset/sft_mini_512.jsonl --json out/stats.json

Tokens come from the cache that training uses. A bad record is left out and counted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minimind.data.copies import find_copies
from minimind.data.found import Found
from minimind.data.holdout import all_documents
from minimind.data.packing import pack
from minimind.data.prepare import prepare
from minimind.data.records import KINDS, AskedKind, TextRecord, chats_of, kind_of, parsed_blocks
from minimind.data.scripts import LanguageCount
from minimind.data.segments import make_segments
from minimind.data.stats_report import draw, show
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.files import check_ending, write_text
from minimind.flags import REQUIRED, flag, parse_flags
from minimind.paths import OUT_DIR
from minimind.tokenizer import Tokenizer


@dataclass(frozen=True)
class StatsOptions:
    file: Path = flag(REQUIRED, "JSONL file, plain or .gz", positional=True)
    kind: AskedKind = flag("auto", "what the records are; auto is told from the first", choices=KINDS)
    max_seq_len: tuple[int, ...] = flag((512, 1024, 2048), "lengths of a row in tokens: what is cut off")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")
    picture: Path | None = flag(None, "where the picture goes; without it out/stats/ and the file's name")
    json: Path | None = flag(None, "file to write the figures to, for programs")

    def __post_init__(self) -> None:
        check_ending("--picture", self.picture, ".png", ".svg", ".pdf", ".jpg")
        check_ending("--json", self.json, ".json")
        for length in self.max_seq_len:
            if length < 8:
                raise UserError(f"--max_seq_len is {length}; it must be at least 8")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a record, of both conversations of a pair."""

    mean: float
    median: float
    p90: float
    p99: float
    max: int
    histogram: dict[int, int]  # records by the power of two that their length reaches

    @classmethod
    def of(cls, tokens: np.ndarray) -> Lengths:
        median, p90, p99 = map(float, np.percentile(tokens, (50, 90, 99)))
        powers = np.bincount(np.frexp(tokens)[1] - 1)
        histogram = {1 << i: int(count) for i, count in enumerate(powers) if count}
        return cls(float(tokens.mean()), median, p90, p99, int(tokens.max()), histogram)


@dataclass(frozen=True)
class Packed:
    """What becomes of the records in rows of `max_seq_len` tokens; see `segments.CutReport`."""

    max_seq_len: int
    rows: int
    padding: float  # positions without a token, of all
    split: int  # texts made into several pieces, of which nothing is lost
    cut: int  # conversations that lose their last answers
    dropped: int  # conversations and pairs of which nothing fits
    cut_tokens: int  # that are lost: of answers in conversations; all in pairs


@dataclass(frozen=True)
class Stats:
    file: str
    kind: str
    records: int
    bad_records: Found
    bytes: int  # of text, as UTF-8
    characters: int
    tokens: int
    target_tokens: int  # to be learnt
    lengths: Lengths
    languages: dict[str, float]  # shares of all letters
    language_of_records: dict[str, int]  # that most of their letters are of
    turns: dict[int, int]  # conversations by the number of their questions
    copies: Found  # records that an earlier one equals
    near_copies: Found  # that an earlier one nearly equals
    packed: list[Packed]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(StatsOptions, argv, __doc__)
    tokenizer = Tokenizer.load(options.tokenizer_path)
    kind = kind_of(options.file, options.kind)
    progress = sys.stderr.isatty()
    store = prepare(options.file, kind, tokenizer, on_bad_record="skip", progress=progress)
    stats = statistics(options.file, store, tokenizer.eos_id, options.max_seq_len)
    show(stats)
    if options.json:
        write_text(options.json, json.dumps(asdict(stats), ensure_ascii=False, indent=1) + "\n")
    picture = options.picture or OUT_DIR / "stats" / f"{options.file.name.partition('.jsonl')[0]}.png"
    draw(picture, np.diff(store.record_offsets), options.max_seq_len)
    print(f"lengths as a picture: {picture}")
    return 0


def statistics(path: Path, store: TokenStore, eos_id: int, max_seq_lens: Sequence[int]) -> Stats:
    """Work out everything about `path`, whose tokens are in `store`."""
    languages, turns = read_texts(path, store)
    lines = store.record_lines
    exact, near = find_copies(store)
    bad = [bad.line for bad in store.bad_records() if not bad.used]
    return Stats(
        file=str(path),
        kind=store.kind,
        records=len(lines),
        bad_records=Found.of(np.array(bad, np.int64)),
        bytes=store.meta["utf8_bytes"],
        characters=languages.characters,
        tokens=store.num_tokens,
        target_tokens=store.meta["num_target_tokens"],
        lengths=Lengths.of(np.diff(store.record_offsets)),
        languages=languages.shares(),
        language_of_records=languages.records(),
        turns=dict(sorted(turns.items())),
        copies=Found.of(lines[exact]),
        near_copies=Found.of(lines[near]),
        packed=[pack_rows(store, length, eos_id) for length in max_seq_lens],
    )


def read_texts(path: Path, store: TokenStore) -> tuple[LanguageCount, Counter[int]]:
    """One reading of the file, for what the tokens do not tell: languages, and turns of conversations."""
    languages = LanguageCount()
    turns: Counter[int] = Counter()
    for records, _ in parsed_blocks(path, store.kind):
        texts = []
        for _, record in records:
            if isinstance(record, TextRecord):
                texts.append(record.text)
                continue
            chats = chats_of(record)
            texts.append("".join(message["content"] for chat in chats for message in chat))
            turns[sum(message["role"] == "user" for message in chats[0])] += 1
        languages.add(texts)
    return languages, turns


def pack_rows(store: TokenStore, max_seq_len: int, eos_id: int) -> Packed:
    """What training will make of `store` at `max_seq_len`."""
    segments, report = make_segments(store, all_documents(store), max_seq_len, eos_id)
    rows, tokens = len(pack(segments.counts, max_seq_len)), segments.num_positions
    lost = report.lost_target_tokens
    if store.kind == "preference":
        lost = store.num_tokens - store.num_documents - tokens  # positions of the pairs left out
    return Packed(
        max_seq_len=max_seq_len,
        rows=rows,
        padding=1 - tokens / (rows * max_seq_len) if rows else 0.0,
        split=report.split,
        cut=report.cut,
        dropped=report.dropped,
        cut_tokens=lost,
    )
