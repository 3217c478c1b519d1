"""Write the demo's training data and the questions it is measured with.

A 5-million-parameter model sees about 3 million tokens, so the data teaches a few things well: what 1,000
idioms mean, two-digit addition and subtraction, who it is, and a little small talk in Chinese and English.
The tokens below count for a vocabulary of 6,400, in which this text has about one character per token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import NamedTuple

import msgspec

from minimind.demo import phrases
from minimind.demo.sources import Idiom, Sources, read_sources

SEED = 42

PRETRAIN_ARITHMETIC = 6_000  # worked problems, half of them subtractions (3,895 at most)
PRETRAIN_IDIOMS = 8_000  # idioms beside the taught ones, with an example where there is one
PRETRAIN_CHAPTERS = 50  # of the novel's 120; about 5,000 characters each
PASSAGE_LENGTH = 200  # characters; the novel is cut into passages at the ends of sentences
VALIDATION_DOCUMENTS = 200  # left out of pretraining, to measure it

SFT_ARITHMETIC = 5_000  # worked problems, likewise
TAUGHT_IDIOMS = 1_000
MAX_MEANING = 24  # characters in the meaning of a taught idiom
PHRASINGS_PER_IDIOM = 4  # of the six in `phrases`
SMALL_TALK_REPEATS = 2
MULTI_TURN_SHARE = 0.2  # of the conversations have a second question and answer

HELD_OUT_PAIRS = 200  # unordered pairs of operands, never added or subtracted in training
ASKED_IDIOMS = 200


class Question(NamedTuple):
    """One question of the measurement and the answer that is right."""

    question: str
    answer: str


@dataclass(frozen=True)
class DemoData:
    """The files that were written, how many records each holds, and the questions to measure with."""

    pretrain: Path
    pretrain_val: Path
    sft: Path
    arithmetic: list[Question]
    identity: list[Question]
    idioms: list[Question]
    records: dict[str, int]


class Problem(NamedTuple):
    """An addition or subtraction of two two-digit numbers; a subtraction never goes below zero."""

    a: int
    b: int
    operator: str  # "+" or "-"

    @property
    def result(self) -> int:
        return self.a + self.b if self.operator == "+" else self.a - self.b

    def question(self, rng: random.Random) -> str:
        templates = phrases.ADDITION_QUESTIONS if self.operator == "+" else phrases.SUBTRACTION_QUESTIONS
        return rng.choice(templates).format(a=self.a, b=self.b)

    def worked(self) -> str:
        """The answer, digit by digit from the units, as at school.

        Every step is a fact about single digits that stand right before it, and those are few enough to be
        learnt from a few thousand examples. The sum in one piece ("37+48=85") takes far more.
        """
        tens_a, units_a = divmod(self.a, 10)
        tens_b, units_b = divmod(self.b, 10)
        units = f"个位{units_a}{self.operator}{units_b}"
        tens = f"十位{tens_a}{self.operator}{tens_b}"
        if self.operator == "+":
            carry = units_a + units_b >= 10
            units += f"={units_a + units_b}" + (f"，写{(units_a + units_b) % 10}进1" if carry else "")
            tens += ("+1" if carry else "") + f"={tens_a + tens_b + carry}"
        else:
            borrow = units_a < units_b
            units += (f"不够减，借1，1{units_a}-{units_b}" if borrow else "") + f"={(units_a - units_b) % 10}"
            tens += ("-1" if borrow else "") + f"={tens_a - tens_b - borrow}"
        problem = f"{self.a}{self.operator}{self.b}"
        return f"{problem}：{units}；{tens}，所以{problem}={self.result}。"


def write_demo_data(out_dir: Path, *, sources: Sources | None = None, seed: int = SEED) -> DemoData:
    """Write `pretrain.jsonl`, `pretrain_val.jsonl`, `sft.jsonl` and three `eval_*.jsonl` into `out_dir`.

    Without `sources` they are downloaded into `out_dir/.downloads` (UserError when that fails). The files
    depend on nothing but the sources and the seed. No held-out pair of operands, in either order, and no
    held-out phrasing of "who are you?" is in the training files.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    sources = sources or read_sources(out_dir / ".downloads")
    held_out, problems = split_problems(random_generator(seed, "pairs"))
    taught, others = _split_idioms(sources.idioms, random_generator(seed, "idioms"))
    small_talk = [talk for talk in sources.small_talk if not _speaks_of_itself(talk)]

    texts = [
        *_arithmetic_texts(problems, random_generator(seed, "pretrain arithmetic")),
        *_idiom_texts(taught, others),
        *(p for chapter in sources.novel[:PRETRAIN_CHAPTERS] for p in passages(chapter, PASSAGE_LENGTH)),
        *("\n".join(conversation) for conversation in small_talk),
    ]
    validation = list(_validation_texts(sources.novel[PRETRAIN_CHAPTERS:], others[PRETRAIN_IDIOMS:]))
    idiom_chats, idiom_questions = _teach_idioms(taught, random_generator(seed, "phrasings"))
    chats = [
        *_arithmetic_chats(problems, random_generator(seed, "sft arithmetic")),
        *idiom_chats,
        *_identity_chats(),
        *_small_talk_chats(small_talk) * SMALL_TALK_REPEATS,
    ]
    random_generator(seed, "order of texts").shuffle(texts)
    chats = _with_second_turns(chats, random_generator(seed, "order of chats"))
    _assert_held_out(held_out, texts, chats)

    questions: dict[str, list[Question]] = {
        "arithmetic": _arithmetic_questions(held_out, random_generator(seed, "eval arithmetic")),
        "identity": [Question(question, "MiniMind") for question in phrases.HELD_OUT_NAME_QUESTIONS],
        "idioms": idiom_questions,
    }
    files: dict[str, list[dict]] = {
        "pretrain.jsonl": [{"text": text} for text in texts],
        "pretrain_val.jsonl": [{"text": text} for text in validation],
        "sft.jsonl": [{"conversations": messages(chat)} for chat in chats],
    }
    files |= {f"eval_{name}.jsonl": [q._asdict() for q in asked] for name, asked in questions.items()}
    for name, records in files.items():
        write_jsonl(out_dir / name, records)
    return DemoData(
        pretrain=out_dir / "pretrain.jsonl",
        pretrain_val=out_dir / "pretrain_val.jsonl",
        sft=out_dir / "sft.jsonl",
        **questions,
        records={name: len(records) for name, records in files.items()},
    )


# Arithmetic


def split_problems(rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """Held-out and training problems; both operations and both orders of a pair fall on the same side."""
    pairs = list(combinations_with_replacement(range(10, 100), 2))
    rng.shuffle(pairs)
    held_out = []
    for low, high in pairs[:HELD_OUT_PAIRS]:
        first, second = rng.sample((low, high), 2)
        held_out += [Problem(first, second, "+"), Problem(high, low, "-")]
    training = [
        problem
        for low, high in pairs[HELD_OUT_PAIRS:]
        for problem in {Problem(low, high, "+"): 0, Problem(high, low, "+"): 0, Problem(high, low, "-"): 0}
    ]
    return held_out, training


def _sample(problems: list[Problem], count: int, rng: random.Random) -> list[Problem]:
    """As many subtractions as additions: there are half as many, and they are harder to learn."""
    return [
        problem
        for operator in "+-"
        for problem in rng.sample([p for p in problems if p.operator == operator], count // 2)
    ]


def _arithmetic_texts(problems: list[Problem], rng: random.Random) -> list[str]:
    return [problem.worked() for problem in _sample(problems, PRETRAIN_ARITHMETIC, rng)]


def _arithmetic_chats(problems: list[Problem], rng: random.Random) -> list[list[str]]:
    return [[p.question(rng), p.worked()] for p in _sample(problems, SFT_ARITHMETIC, rng)]


def _arithmetic_questions(held_out: list[Problem], rng: random.Random) -> list[Question]:
    return [Question(problem.question(rng), str(problem.result)) for problem in held_out]


# Idioms


def _split_idioms(idioms: list[Idiom], rng: random.Random) -> tuple[list[Idiom], list[Idiom]]:
    """The idioms to teach, and the others in random order."""
    idioms = [_mended(idiom) for idiom in idioms]
    rng.shuffle(idioms)
    taught = [idiom for idiom in idioms if _teachable(idiom)][:TAUGHT_IDIOMS]
    words = {idiom.word for idiom in taught}
    return taught, [idiom for idiom in idioms if idiom.word not in words]


def _mended(idiom: Idiom) -> Idiom:
    """The dictionary lost its opening quotation marks, has ◇ for "。后" and ～ for the idiom itself."""
    example = idiom.example.replace("～", idiom.word).replace("★", "——")
    return idiom._replace(
        meaning=re.sub("[“”]", "", idiom.meaning.replace("◇", "。后")),
        example=re.sub("[“”]", "", example),
    )


def _teachable(idiom: Idiom) -> bool:
    """Four characters, in use (it has a source and an example), with a short meaning in Chinese words.

    A meaning that begins with a character of the idiom is a gloss whose colon was lost ("凡总共。…").
    """
    return bool(
        len(idiom.word) == 4
        and 6 <= len(idiom.meaning) <= MAX_MEANING
        and re.fullmatch(r"[\u4e00-\u9fff，、；。]+", idiom.meaning)
        and idiom.meaning[0] not in idiom.word
        and not re.search("同.{4}。$", idiom.meaning)
        and idiom.source
        and idiom.example
    )


def _idiom_texts(taught: list[Idiom], others: list[Idiom]) -> list[str]:
    statements = [
        statement.format(word=idiom.word, meaning=idiom.meaning)
        for idiom, statement in product(taught, phrases.IDIOM_STATEMENTS)
    ]
    return statements + [_entry(idiom) for idiom in others[:PRETRAIN_IDIOMS]]


def _entry(idiom: Idiom) -> str:
    example = f"\n例如：{idiom.example}" if idiom.example else ""
    return f"{idiom.word}：{idiom.meaning}{example}"


def _teach_idioms(taught: list[Idiom], rng: random.Random) -> tuple[list[list[str]], list[Question]]:
    """Chats that teach the idioms, and questions about some, in a phrasing new for that idiom."""
    chats, questions = [], []
    for idiom in taught:
        *training, unseen = rng.sample(phrases.IDIOM_QUESTIONS, PHRASINGS_PER_IDIOM + 1)
        chats += [[template.format(word=idiom.word), idiom.meaning] for template in training]
        questions.append(Question(unseen.format(word=idiom.word), idiom.meaning))
    return chats, rng.sample(questions, min(ASKED_IDIOMS, len(questions)))


# Identity and small talk


def _identity_chats() -> list[list[str]]:
    """Every question about MiniMind with every answer to it."""
    topics = (
        (phrases.NAME_QUESTIONS, phrases.NAME_ANSWERS),
        (phrases.NAME_QUESTIONS_ENGLISH, phrases.NAME_ANSWERS_ENGLISH),
        (phrases.MAKER_QUESTIONS, phrases.MAKER_ANSWERS),
        (phrases.MAKER_QUESTIONS_ENGLISH, phrases.MAKER_ANSWERS_ENGLISH),
        (phrases.SKILL_QUESTIONS, phrases.SKILL_ANSWERS),
        (phrases.SKILL_QUESTIONS_ENGLISH, phrases.SKILL_ANSWERS_ENGLISH),
    )
    return [list(chat) for questions, answers in topics for chat in product(questions, answers)]


def _speaks_of_itself(conversation: list[str]) -> bool:
    """Whether the downloaded small talk gives its speaker a name or nature that is not MiniMind's."""
    claims = r"你是谁|你是个机器人|谁是你|ChatterBot|bot之间|面具|[Ww]ho |[Ww]hat are you|[Rr]obot|mask"
    return any(re.search(claims, line) for line in conversation)


def _small_talk_chats(small_talk: list[list[str]]) -> list[list[str]]:
    """At most two turns of each conversation, which must end with an answer."""
    turns = (conversation[: min(len(conversation) // 2 * 2, 4)] for conversation in small_talk)
    return [*(list(pair) for pair in phrases.SMALL_TALK), *(turn for turn in turns if turn)]


# The novel


def passages(paragraphs: list[str], length: int) -> Iterator[str]:
    """Cut the paragraphs at the ends of sentences into passages of about `length` characters."""
    passage = ""
    for sentence in re.findall(r"[^。！？]*[。！？]+[”’]?|[^。！？]+$", "\n".join(paragraphs)):
        if passage and len(passage) + len(sentence) > length:
            yield passage.strip()
            passage = ""
        passage += sentence
    if passage.strip():
        yield passage.strip()


def _validation_texts(chapters: list[list[str]], idioms: list[Idiom]) -> Iterable[str]:
    """Half from chapters of the novel, half from idioms, that pretraining does not read."""
    half = VALIDATION_DOCUMENTS // 2
    unread = [passage for chapter in chapters[:5] for passage in passages(chapter, PASSAGE_LENGTH)]
    return [*unread[:half], *(_entry(idiom) for idiom in idioms[:half])]


# Files


def _with_second_turns(chats: list[list[str]], rng: random.Random) -> list[list[str]]:
    """The chats in random order, some joined with the next so that the model learns to answer twice."""
    rng.shuffle(chats)
    joined: list[list[str]] = []
    for chat in chats:
        if joined and len(joined[-1]) == 2 and rng.random() < MULTI_TURN_SHARE:
            joined[-1] = joined[-1] + chat
        else:
            joined.append(chat)
    return joined


def _assert_held_out(held_out: list[Problem], texts: list[str], chats: list[list[str]]) -> None:
    """Search the finished training data for what it must not hold."""
    lines = [*texts, *(line for chat in chats for line in chat)]
    pairs = {frozenset((problem.a, problem.b)) for problem in held_out}
    sums = re.compile(r"(?<!\d)(\d\d)(?:[+-]|加上?|减去?)(\d\d)(?!\d)")
    trained = {frozenset((int(a), int(b))) for line in lines for a, b in sums.findall(line)}
    assert not pairs & trained, "held-out operands in the training data"
    unseen = {bare(question) for question in phrases.HELD_OUT_NAME_QUESTIONS}
    assert not unseen & {bare(line) for line in lines}, "a held-out phrasing in the training data"


def bare(text: str) -> str:
    """The text without case, punctuation and spaces, to compare phrasings by."""
    return re.sub(r"[\W_]", "", text.lower())


def messages(chat: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if turn % 2 else "user", "content": content} for turn, content in enumerate(chat)
    ]


def random_generator(seed: int, part: str) -> random.Random:
    """A generator for one part, so that changing the size of another part leaves this one as it was."""
    return random.Random(f"{seed} {part}")


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
