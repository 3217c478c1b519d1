"""Multiple-choice questions as C-Eval and CMMLU have them, and how a model is asked them.

    {"question": "…", "A": "…", "B": "…", "C": "…", "D": "…", "answer": "C", "subject": "…"}

A file holds one such object a line (.jsonl, plain or gzipped), or it is the CSV file of a subject, as the
benchmarks publish them. Capital letters in field names do not count, but for those of the options. Without
a `subject` the name of the file is it: `accountant_val.csv` is of accountant.

A question is asked in two ways. By letter the options stand in the prompt and the endings that compete are
` A`, ` B`, ` C`, ` D`. By text the options themselves are the endings, and the prompt has only the question:

    <|im_start|>问题                                <|im_start|>问题
    A. 甲                                          答案： 甲
    …
    D. 丁
    答案： A

So a base model reads them, as the text it was trained on. For a model that was trained to answer, all but
the last line is a user's message in the chat template, and `答案：` begins its answer. An ending begins with
a space, as in lm-eval's C-Eval and CMMLU tasks: no token of ours crosses that border.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from minimind.data.lines import BadRecord, read_lines
from minimind.data.records import ANY_OBJECT, InvalidLine, decode_line, wrong_field
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

Way = Literal["letter", "text"]
WAYS: tuple[Way, ...] = ("letter", "text")
LETTERS = "ABCD"
ANSWER = "答案："
LONGEST = 4096  # tokens of a question with an ending; memory grows with the square


class Fields(msgspec.Struct):
    """What a record must have."""

    question: str
    A: str
    B: str
    C: str
    D: str
    answer: str
    subject: str | None = None


@dataclass(frozen=True)
class Question:
    subject: str
    text: str
    options: tuple[str, ...]
    answer: int  # index into options
    file: str
    line: int

    def asked(self, way: Way) -> str:
        """What the prompt says before `ANSWER`."""
        if way == "text":
            return self.text
        listed = (f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True))
        return self.text + "".join(listed)

    def endings(self, way: Way) -> list[str]:
        return [f" {ending}" for ending in (LETTERS if way == "letter" else self.options)]

    def solved(self, way: Way) -> str:
        """The question with its answer, as an example before another."""
        return f"{self.asked(way)}\n{ANSWER}{self.endings(way)[self.answer]}\n\n"


def encode_prompts(
    questions: Sequence[Question],
    examples: Sequence[Question],
    way: Way,
    tokenizer: Tokenizer,
    chat: bool,
    max_seq_len: int,
) -> list[tuple[list[int], list[list[int]], int]]:
    """Each question as (ids of its prompt, ids of its endings, examples before it).

    Of the examples, the same for all, the last ones are left out where a prompt with its longest ending would
    have more than `max_seq_len` tokens.

    Raises: UserError for a question of more than `LONGEST` tokens.
    """
    encoded = iter(tokenizer.encode_batch([end for question in questions for end in question.endings(way)]))
    endings = [[next(encoded) for _ in LETTERS] for _ in questions]
    prompts: dict[int, tuple[list[int], int]] = {}
    waiting = list(range(len(questions)))
    for count in range(len(examples), -1, -1):
        before = "".join(example.solved(way) for example in examples[:count])
        contents = [before + questions[i].asked(way) for i in waiting]
        for i, ids in zip(waiting, _encode(contents, tokenizer, chat), strict=True):
            length = len(ids) + max(map(len, endings[i]))
            if count and length > max_seq_len:
                continue
            if length > LONGEST:
                where = f"{questions[i].file}:{questions[i].line}"
                raise UserError(f"{where}: takes {length:,} tokens; a question may have {LONGEST:,}")
            prompts[i] = ids, count
        waiting = [i for i in waiting if i not in prompts]
        if not waiting:
            break
    return [(prompts[i][0], endings[i], prompts[i][1]) for i in range(len(questions))]


def _encode(contents: Sequence[str], tokenizer: Tokenizer, chat: bool) -> list[list[int]]:
    """`contents` as a model reads them, up to where an ending begins."""
    if not chat:
        texts = tokenizer.encode_batch([f"{content}\n{ANSWER}" for content in contents])
        return [[tokenizer.bos_id, *ids] for ids in texts]
    answer = tokenizer.encode(ANSWER)
    return [
        tokenizer.encode_chat([{"role": "user", "content": content}], add_generation_prompt=True)[0] + answer
        for content in contents
    ]


# Reading


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in their order. Raises: UserError naming the file, line and field at fault."""
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    subject = re.sub(r"\.(jsonl|json|csv)(\.gz)?$|\.gz$", "", path.name, flags=re.IGNORECASE)
    subject = re.sub(r"[_-](test|val|dev|train)$", "", subject)
    questions = []
    for line, row in rows:
        try:
            questions.append(_question(row, subject, str(path), line))
        except InvalidLine as error:
            raise UserError(str(BadRecord(str(path), line, error.field, error.reason))) from None
    if not questions:
        raise UserError(f"{path}: no question in this file")
    return questions


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for item in read_lines(path):
        if isinstance(item, BadRecord):
            if item.used:  # a flaw that changes nothing
                continue
            raise UserError(str(item))
        number, line = item
        try:
            yield number, decode_line(line, ANY_OBJECT)
        except InvalidLine as error:
            raise UserError(str(BadRecord(str(path), number, error.field, error.reason))) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield rows.line_num, {name: cell for name, cell in row.items() if name and cell is not None}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not CSV in UTF-8: {error}; convert it or fetch it again") from None


def _question(row: dict[str, Any], subject: str, file: str, line: int) -> Question:
    """Raises: InvalidLine."""
    row = {name if name in LETTERS else name.lower(): value for name, value in row.items()}
    try:
        fields = msgspec.convert(row, Fields)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error)) from None
    texts = {name: getattr(fields, name).strip() for name in ("question", *LETTERS)}
    for name, text in texts.items():
        if not text:
            raise InvalidLine(name, "empty")
    answer = fields.answer.strip().upper()
    if answer not in tuple(LETTERS):
        unknown = "; test parts are published without answers, the val parts have them" if not answer else ""
        raise InvalidLine("answer", f"{fields.answer[:40]!r} is none of A, B, C and D{unknown}")
    return Question(
        (fields.subject or "").strip() or subject,
        texts["question"],
        tuple(texts[letter] for letter in LETTERS),
        LETTERS.index(answer),
        file,
        line,
    )


def examples_by_subject(path: Path, subjects: Sequence[str], shots: int) -> dict[str, list[Question]]:
    """The first `shots` questions of each subject. Raises: UserError when a subject has fewer."""
    found: dict[str, list[Question]] = {subject: [] for subject in subjects}
    for question in read_questions(path):
        if question.subject in found:
            found[question.subject].append(question)
    for subject, questions in found.items():
        if len(questions) < shots:
            raise UserError(
                f"{path} has {len(questions)} examples of {subject} and --shots is {shots}; name the "
                "benchmark's dev file with --examples_path, or ask for fewer"
            )
    return {subject: questions[:shots] for subject, questions in found.items()}
