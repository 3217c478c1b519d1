"""What is wrong with the records of a data file, and where.

    minimind data check dataset/sft_mini_512.jsonl

Each finding is one line: OK, WARNING or PROBLEM. The exit code is 1 when there is a problem.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind.data.copies import exact_copies
from minimind.data.found import Found
from minimind.data.prepare import prepare
from minimind.data.records import KINDS, AskedKind, Kind, Record, kind_of, parsed_blocks, text_of
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.findings import OK, PROBLEM, WARNING, Finding, verdict
from minimind.flags import REQUIRED, flag, parse_flags
from minimind.stages.dpo import DPOOptions
from minimind.stages.pretrain import PretrainOptions
from minimind.stages.reason import ReasonOptions
from minimind.stages.sft import SFTOptions
from minimind.tokenizer import Tokenizer
from minimind.train.options import TrainOptions

READ_BY: dict[Kind, type[TrainOptions]] = {
    "pretrain": PretrainOptions,
    "conversation": SFTOptions,
    "reasoning": ReasonOptions,
    "preference": DPOOptions,
}
FATE = {  # of records that are too long
    "pretrain": "they are split, and nothing is lost",
    "conversation": "they lose their last answers, or all; raise it",
    "reasoning": "they lose their last answers, or all; raise it",
    "preference": "they are left out; raise it",
}
FEW_CHARACTERS = 5
# A flaw is a problem where more than this share of all records has it, else a warning.
TOLERATED = {"copied": 0.1, "over-long": 0.1, "nearly empty": 0.01, "garbled": 0.001}

# What is left of text that went through the wrong encoding: replacement and control characters, UTF-8 read as
# Latin-1 ("Ã©", "ä¸\xad"), and what GBK makes of replacement characters or of unset memory.
GARBAGE = re.compile(
    "[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[ÂÃ][\xa0-\xbf]|[à-ï][\x80-\xbf]{2}|â€[œ™˜¦“”]|锟斤拷|烫烫烫|屯屯屯"
)
GARBLED_SHARE = 0.001  # of a record's characters; one lost character in a novel does no harm


@dataclass(frozen=True)
class CheckOptions:
    file: Path = flag(REQUIRED, "JSONL file, plain or .gz", positional=True)
    kind: AskedKind = flag("auto", "what the records are; auto is told from the first", choices=KINDS)
    max_seq_len: int | None = flag(None, "length of a row in tokens; without it as the stage that reads them")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and self.max_seq_len < 8:
            raise UserError(f"--max_seq_len is {self.max_seq_len}; it must be at least 8")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(CheckOptions, argv, __doc__)
    tokenizer = Tokenizer.load(options.tokenizer_path)
    return check(options.file, options.kind, options.max_seq_len, tokenizer)


@dataclass
class Flaw(Found):
    """The records that share a flaw."""

    example: str = ""  # how it is in the first

    def add(self, line: int, example: str = "") -> None:
        super().add(line)
        self.example = self.example or example


class Look:
    """One reading of a file, block by block: all that can be told without a tokenizer."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.bad: dict[str, Flaw] = defaultdict(Flaw)  # by reason
        self.nearly_empty, self.garbled = Flaw(), Flaw()
        self.good = 0
        for records, bad in parsed_blocks(path, kind):
            self.good += len(records)
            for flaw in bad:
                example = f"{flaw.field}: {flaw.reason}"
                self.bad[re.sub(r"\d+|`.*`", "", example)].add(flaw.line, example)
            for line, record in records:
                self.look_at(line, record)

    def look_at(self, line: int, record: Record) -> None:
        text = text_of(record)
        if len(text.strip()) < FEW_CHARACTERS:
            self.nearly_empty.add(line, repr(text))
        garbage = GARBAGE.findall(text)
        if sum(map(len, garbage)) > GARBLED_SHARE * len(text):
            self.garbled.add(line, repr(garbage[0]))


def check(path: Path, asked: AskedKind, max_seq_len: int | None, tokenizer: Tokenizer) -> int:
    """Print what is found in `path`. Returns the exit code. Tokens come from the cache that training uses.

    Raises: UserError when the file cannot be read, or its kind not be told.
    """
    told = ", told from its first record" if asked == "auto" else ""
    kind = kind_of(path, asked)
    look = Look(path, kind)
    print(f"{path}: {look.good:,} good records of kind {kind}{told}", flush=True)
    findings = [
        Finding(PROBLEM, f"{flaw.count:,} bad: {flaw.example} ({flaw.where}); mend, or --on_bad_record skip")
        for flaw in look.bad.values()
    ] or [Finding(OK, "no bad records")]
    if not look.good:
        return verdict([*findings, Finding(PROBLEM, f"no usable record; is --kind {kind} right?")], "")
    length = max_seq_len or READ_BY[kind].max_seq_len
    store = prepare(path, kind, tokenizer, on_bad_record="skip", progress=sys.stderr.isatty())
    copied = Flaw.of(store.record_lines[exact_copies(store)])
    flaws = {
        "copied": (copied, "copies of an earlier record; leave them out, or they count more"),
        "nearly empty": (look.nearly_empty, f"with less than {FEW_CHARACTERS} characters; leave them out"),
        "garbled": (look.garbled, "garbled by a wrong encoding; convert their source anew or leave them out"),
        "over-long": (over_long(store, length), f"longer than --max_seq_len {length}; {FATE[kind]}"),
    }
    for name, (flaw, text) in flaws.items():
        share = flaw.count / look.good
        tolerated = 1.0 if (name, kind) == ("over-long", "pretrain") else TOLERATED[name]  # nothing is lost
        level = OK if not flaw.count else PROBLEM if share > tolerated else WARNING
        example = f"{flaw.example} in " if flaw.example else ""
        found = f"{flaw.count:,} ({share:.1%}) {text} ({example}{flaw.where})"
        findings.append(Finding(level, found if flaw.count else f"no {name} records"))
    return verdict(findings, "fit to train on")


def over_long(store: TokenStore, max_seq_len: int) -> Flaw:
    """The records that need more than `max_seq_len` positions."""
    positions = np.diff(store.offsets) - 1  # a document's first token is no label
    if store.kind == "preference":
        positions = positions.reshape(-1, 2).sum(axis=1)
    elif store.weights is not None:  # what follows the last answer is not needed
        for start in range(0, len(positions), 4096):
            offsets = store.offsets[start : start + 4097]
            targets = offsets[0] + np.flatnonzero(store.weights[offsets[0] : offsets[-1]])
            last = targets[np.searchsorted(targets, offsets[1:]) - 1]
            positions[start : start + 4096] = last - offsets[:-1]
    return Flaw.of(store.record_lines[positions > max_seq_len])
