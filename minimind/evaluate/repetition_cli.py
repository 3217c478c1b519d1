"""`minimind eval repetition`: how many answers end in a loop, how many do not end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minimind.chat.options import SamplingOptions
from minimind.errors import UserError
from minimind.evaluate.intervals import Share
from minimind.evaluate.options import INTERRUPTED, EvalOptions, Loaded, progress_bar, say
from minimind.evaluate.repetition import ends_in_loop
from minimind.flags import REQUIRED, flag, parse_flags, part_of

BEGINNING = 20  # characters of a text that a pretrained model is to go on with
ROWS = 32  # answers at once


@dataclass(frozen=True)
class RepetitionOptions(SamplingOptions, EvalOptions):
    data: Path = flag(
        REQUIRED, "JSONL file: first questions of conversations, beginnings of texts", positional=True
    )
    limit: int = flag(200, "take only the first so many")
    max_new_tokens: int = flag(256, "tokens of an answer")
    seed: int = flag(0, "of the draws")

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        EvalOptions.__post_init__(self)
        if self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """How many answers end by saying the same thing over and over, and how many do not end by themselves.

    Answers are drawn as in a chat. A loop is a unit of 1 to 20 characters, at least 4 times in a row at the
    end. Shares come with their 95 % intervals (Wilson).

        minimind eval repetition dataset/sft_mini_512.jsonl
        minimind eval repetition dataset/pretrain_val.jsonl --model_mode 0 --temperature 0
    """
    options = parse_flags(RepetitionOptions, argv, inspect.getdoc(main))
    texts = prompts(options.data, options.limit)
    loaded, sampling = options.load(), part_of(options, SamplingOptions)
    answers: dict[int, Answer] = {}
    code = 0
    try:
        with progress_bar("answers", len(texts)) as show:
            for place, answer in answer_all(loaded, texts, sampling):
                answers[place] = answer
                show(len(answers))
    except KeyboardInterrupt:
        code = INTERRUPTED
        say(f"stopped after {len(answers):,} of {len(texts):,} answers; this is what they give:")
    if not answers:
        return code
    loops = Share(sum(ends_in_loop(answer.text) for answer in answers.values()), len(answers))
    cut = Share(sum(answer.cut for answer in answers.values()), len(answers))
    print(f"{loops} % of {len(answers):,} answers end in a loop")
    print(f"{cut} % do not end within {options.max_new_tokens} tokens")
    if code == 0:
        found = {
            "sampling": asdict(sampling),
            "loops": {"share": loops.value, "interval": loops.interval},
            "cut": {"share": cut.value, "interval": cut.interval},
            "answers": [{"prompt": texts[i]} | answers[i]._asdict() for i in sorted(answers)],
        }
        options.write_json(loaded, {"repetition": found})
    return code


class Answer(NamedTuple):
    text: str
    cut: bool  # by --max_new_tokens


def prompts(path: Path, limit: int) -> list[str]:
    """The first question of each conversation or pair, or the beginning of each text.

    Raises: UserError as reading data does.
    """
    from minimind.data.records import TextRecord, chats_of, kind_of, read_records

    texts = []
    for _, record in islice(read_records(path, kind_of(path)), limit):
        if isinstance(record, TextRecord):
            texts.append(record.text[:BEGINNING])
        else:
            texts.append(next(m["content"] for m in chats_of(record)[0] if m["role"] == "user"))
    return texts


def answer_all(
    loaded: Loaded, texts: Sequence[str], options: SamplingOptions
) -> Iterator[tuple[int, Answer]]:
    """The answer to each of `texts`, with its place, as they come."""
    from torch import float32

    from minimind.chat.generate import generate_each
    from minimind.chat.inference import InferenceModel
    from minimind.chat.session import ChatSession

    tokenizer = loaded.tokenizer
    model = InferenceModel(loaded.model, "fp32" if loaded.parallel.dtype is float32 else "half")
    session = ChatSession(tokenizer, chat=loaded.answers)
    ids = [session.prompt_ids(text) for text in texts]
    for place, tokens, cut in generate_each(model, ids, options, rows=ROWS):
        yield place, Answer(tokenizer.decode(tokens), cut)
