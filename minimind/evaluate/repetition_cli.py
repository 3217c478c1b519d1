"""`minimind eval repetition`: how many answers end in a loop, how many do not end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minimind.chat.options import SamplingOptions
from minimind.errors import UserError
from minimind.evaluate.intervals import Share
from minimind.evaluate.options import INTERRUPTED, EvalOptions, Loaded, progress_bar, say
from minimind.evaluate.repetition import ends_in_loop
from minimind.flags import flag, parse_flags

BEGINNING = 20  # characters of a text that a pretrained model is to go on with
ROWS = 32  # answers at once
DRAWN = SamplingOptions(max_new_tokens=256, seed=0)


@dataclass(frozen=True)
class RepetitionOptions(EvalOptions):
    data: Path | None = flag(
        None, "JSONL file: first questions of conversations, beginnings of texts", positional=True
    )
    limit: int = flag(200, "take only the first so many")
    temperature: float = flag(DRAWN.temperature, "0: always the likeliest token")
    top_p: float = flag(DRAWN.top_p, "share of the probability to draw from")
    top_k: int | None = flag(DRAWN.top_k, "draw from the k likeliest tokens; without it all")
    min_p: float = flag(DRAWN.min_p, "draw only tokens at least this share as likely as the likeliest; 0: all")
    repetition_penalty: float = flag(DRAWN.repetition_penalty, "1: none")
    max_new_tokens: int = flag(DRAWN.max_new_tokens, "tokens of an answer")
    seed: int = flag(DRAWN.seed, "of the draws")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be at least 1")
        if self.data is None:
            raise UserError("name a JSONL file with questions (conversations) or texts to go on with")
        self.sampling()

    def sampling(self) -> SamplingOptions:
        return SamplingOptions(**{item.name: getattr(self, item.name) for item in fields(SamplingOptions)})


def main(argv: Sequence[str] | None = None) -> int:
    """How many answers end by saying the same thing over and over, and how many do not end by themselves.

    Answers are drawn as in a chat. A loop is a unit of 1 to 20 characters, at least 4 times in a row at the
    end. Shares come with their 95 % intervals (Wilson).

        minimind eval repetition dataset/sft_mini_512.jsonl
        minimind eval repetition dataset/pretrain_val.jsonl --model_mode 0 --temperature 0
    """
    options = parse_flags(RepetitionOptions, argv, inspect.getdoc(main))
    texts = prompts(options.data, options.limit)
    loaded = options.load()
    answers: dict[int, Answer] = {}
    code = 0
    try:
        with progress_bar("answers", len(texts)) as show:
            for place, answer in answer_all(loaded, texts, options.sampling()):
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
            "sampling": asdict(options.sampling()),
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
    from minimind.data.records import kind_of, read_records

    kind = kind_of(path)
    texts = []
    for _, record in islice(read_records(path, kind), limit):
        if kind == "pretrain":
            texts.append(record.text[:BEGINNING])
        else:
            messages = record.chosen if kind == "preference" else record.conversations
            texts.append(next(m["content"] for m in messages if m["role"] == "user"))
    return texts


def answer_all(
    loaded: Loaded, texts: Sequence[str], options: SamplingOptions
) -> Iterator[tuple[int, Answer]]:
    """The answer to each of `texts`, with its place, as they come; prompt i is drawn with the seed + i."""
    from torch import float32

    from minimind.chat.engine import Engine
    from minimind.chat.inference import InferenceModel
    from minimind.chat.session import ChatSession

    tokenizer = loaded.tokenizer
    model = InferenceModel(loaded.model, "fp32" if loaded.parallel.dtype is float32 else "half")
    session = ChatSession(tokenizer, chat=loaded.answers)
    ids = [session.prompt_ids(text) for text in texts]
    engine = Engine(model, ROWS, max(map(len, ids)) + options.max_new_tokens)
    for place, prompt in enumerate(ids):
        engine.submit(prompt, replace(options, seed=(options.seed + place) % 2**63))
    tokens: dict[int, list[int]] = {place: [] for place in range(len(ids))}  # requests count from 0 too
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                tokens[event.id].append(event.token)
            if event.finished:
                yield event.id, Answer(tokenizer.decode(tokens[event.id]), event.finished == "length")
