"""Write what `make demo STAGES=all` trains the other four stages on, and what it measures them with.

The questions of the measurement, the operands in them and the pairs are apart from those trained on, here
as in `data`; and what `data` holds out of pretraining and fine-tuning is what is held out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from minimind.demo import phrases
from minimind.demo.data import (
    PASSAGE_LENGTH,
    SEED,
    Question,
    messages,
    passages,
    random_generator,
    split_problems,
    write_jsonl,
)
from minimind.demo.word_problems import WordProblem, word_problems

NEW_NAME = "Nova"  # what the adapter is to call itself

# All of these were taught alike. DPO is to prefer the first, which say what is speaking.
PREFERRED = (phrases.NAME_ANSWERS[0], phrases.NAME_ANSWERS[3])
NOT_PREFERRED = (phrases.NAME_ANSWERS[1], phrases.NAME_ANSWERS[2])
PREFERRED_ENGLISH = phrases.NAME_ANSWERS_ENGLISH[:1]
NOT_PREFERRED_ENGLISH = phrases.NAME_ANSWERS_ENGLISH[1:]

WORD_PROBLEMS = 4_000
ASKED_WORD_PROBLEMS = 200

# The first 55 chapters are pretraining's, or what it is measured on.
TAUGHT_CHAPTERS, HELD_OUT_CHAPTERS = slice(55, 110), slice(110, None)
BEGINNING = 30  # characters of a passage that are given, of about 200


@dataclass(frozen=True)
class StageData:
    """The files that were written, and the questions to measure with."""

    identity: Path  # conversations
    pairs: Path
    held_out_pairs: Path
    reasoning: Path  # conversations with the working in <think>
    direct: Path  # the same problems, answered without working
    word_problems: list[Question]
    passages: Path  # conversations that go on with a passage of the novel
    held_out_passages: Path


def write_stage_data(out_dir: Path, novel: list[list[str]], seed: int = SEED) -> StageData:
    """Write the JSONL files into `out_dir`; they depend on the chapters of `novel` and the seed alone."""
    held_out, training = (
        {frozenset((problem.a, problem.b)) for problem in problems}
        for problems in split_problems(random_generator(seed, "pairs"))
    )
    taught = word_problems(training, WORD_PROBLEMS, random_generator(seed, "word problems"))
    asked = word_problems(held_out, ASKED_WORD_PROBLEMS, random_generator(seed, "asked word problems"))
    files = {
        "identity": [{"conversations": messages(chat)} for chat in identity_chats()],
        "pairs": preference_pairs([*phrases.NAME_QUESTIONS, *phrases.NAME_QUESTIONS_ENGLISH]),
        "held_out_pairs": preference_pairs(phrases.HELD_OUT_NAME_QUESTIONS),
        "reasoning": [conversation(problem, problem.reasoned()) for problem in taught],
        "direct": [conversation(problem, str(problem.result)) for problem in taught],
        "passages": continuations(novel[TAUGHT_CHAPTERS]),
        "held_out_passages": continuations(novel[HELD_OUT_CHAPTERS]),
    }
    paths = {name: out_dir / f"{name}.jsonl" for name in files}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        write_jsonl(paths[name], records)
    questions = [Question(problem.question, str(problem.result)) for problem in asked]
    return StageData(**paths, word_problems=questions)


def identity_chats() -> list[list[str]]:
    """Questions about the speaker, answered with the new name, and small talk, lest it be forgotten."""
    topics = (
        (phrases.NAME_QUESTIONS, phrases.NAME_ANSWERS),
        (phrases.NAME_QUESTIONS_ENGLISH, phrases.NAME_ANSWERS_ENGLISH),
        (phrases.MAKER_QUESTIONS, phrases.MAKER_ANSWERS),
        (phrases.MAKER_QUESTIONS_ENGLISH, phrases.MAKER_ANSWERS_ENGLISH),
    )
    renamed = [
        [question, answer.replace("MiniMind", NEW_NAME)]
        for questions, answers in topics
        for question, answer in product(questions, answers)
    ]
    return renamed + [list(pair) for pair in phrases.SMALL_TALK]


def preference_pairs(questions: Sequence[str]) -> list[dict]:
    """Every preferred answer against every other, in the language of the question."""
    pairs = []
    for question in questions:
        answers: tuple[Sequence[str], Sequence[str]] = (PREFERRED, NOT_PREFERRED)
        if question.isascii():
            answers = (PREFERRED_ENGLISH, NOT_PREFERRED_ENGLISH)
        for chosen, rejected in product(*answers):
            pairs.append({"chosen": messages([question, chosen]), "rejected": messages([question, rejected])})
    return pairs


def continuations(chapters: list[list[str]]) -> list[dict]:
    """Passages of the novel as conversations: asked with its beginning, answered with the rest."""
    texts = (text for chapter in chapters for text in passages(chapter, PASSAGE_LENGTH))
    return [
        {"conversations": messages([f"请接着写：{text[:BEGINNING]}", text[BEGINNING:]])}
        for text in texts
        if len(text) > 2 * BEGINNING and not text[BEGINNING:].isspace()
    ]


def conversation(problem: WordProblem, answer: str) -> dict:
    return {"conversations": messages([problem.question, answer])}
