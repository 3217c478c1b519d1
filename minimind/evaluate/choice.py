"""Accuracy on multiple-choice questions, and whether it says anything at all.

Three ways to take a model's choice from the log-probabilities of the endings (see `questions.py`):

    letter          argmax over A–D of log p(letter | question and options)
    text            argmax over the options of log p(option | question)
    text per byte   argmax over the options of log p(option | question) / UTF-8 bytes of the option

The sum of `text` favours short options; per byte it is the bits per byte of the option, which the best has
fewest of. Of options that are equal the first is taken, as lm-eval does (there: acc and acc_bytes).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minimind.evaluate.endings import Item, log_likelihoods
from minimind.evaluate.intervals import Share
from minimind.evaluate.questions import LETTERS, WAYS, Question, Way, encode_prompts
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.train.parallel import Parallel

SCORES = ("letter", "text", "text per byte")
CHANCE = 1 / len(LETTERS)


@dataclass
class Results:
    """What a model chose, question by question; those not yet asked are missing."""

    questions: Sequence[Question]
    log_likelihoods: dict[Way, dict[int, list[float]]] = field(
        default_factory=lambda: {way: {} for way in WAYS}
    )
    examples: list[int] = field(default_factory=list)  # before each prompt
    too_long: int = 0  # prompts of more tokens than the model was trained on

    @property
    def answered(self) -> list[int]:
        """The questions that were asked in both ways, in their order."""
        return sorted(set.intersection(*(set(found) for found in self.log_likelihoods.values())))

    def choice(self, score: str, index: int) -> int:
        """Which option `score` takes for a question."""
        logps = np.array(self.log_likelihoods["letter" if score == "letter" else "text"][index])
        if score == "text per byte":
            logps = logps / [len(option.encode()) for option in self.questions[index].options]
        return int(logps.argmax())

    def accuracy(self, score: str, indices: Sequence[int]) -> Share:
        right = sum(self.choice(score, i) == self.questions[i].answer for i in indices)
        return Share(right, len(indices))

    def unread(self) -> dict[str, Share]:
        """How often rules are right that do not read the question, on those that were answered.

        Right options are longer than wrong ones in many exams, and the scores by text have a liking for a
        length: what such a rule gets is not knowledge.
        """
        questions = [self.questions[index] for index in self.answered]
        lengths = [[len(option.encode()) for option in question.options] for question in questions]
        answers = [question.answer for question in questions]
        letter = max(range(len(LETTERS)), key=answers.count)
        rules = {
            "the longest option": [row.index(max(row)) for row in lengths],
            "the shortest option": [row.index(min(row)) for row in lengths],
            f"always {LETTERS[letter]}": [letter] * len(answers),
        }
        return {
            rule: Share(sum(map(int.__eq__, choices, answers)), len(answers))
            for rule, choices in rules.items()
        }

    def verdict(self, score: str) -> str:
        """Whether the accuracy says anything."""
        accuracy = self.accuracy(score, self.answered)
        verdict = accuracy.against(CHANCE)
        rule, best = max(self.unread().items(), key=lambda item: item[1].value)
        if accuracy.interval.low > CHANCE and accuracy.interval.low <= best.value:
            verdict += f", but not than {rule}"
        return verdict

    def by_subject(self) -> dict[str, list[int]]:
        """The answered questions of each subject."""
        found = defaultdict(list)
        for index in self.answered:
            found[self.questions[index].subject].append(index)
        return dict(found)

    def letters_chosen(self) -> dict[str, float]:
        """How often each letter is taken; a model that always says the same letter knows nothing."""
        chosen = [self.choice("letter", index) for index in self.answered]
        return {letter: chosen.count(i) / max(len(chosen), 1) for i, letter in enumerate(LETTERS)}


def ask(
    model: MiniMind,
    tokenizer: Tokenizer,
    parallel: Parallel,
    results: Results,
    *,
    examples: dict[str, list[Question]],
    chat: bool,
    max_seq_len: int,
    progress: Callable[[], None],
) -> None:
    """Ask all of `results.questions`, filling in what the model makes of them as it goes.

    Args:
        examples: for each subject the solved questions to put before each of its own; may be empty.
        chat: ask through the chat template.
        max_seq_len: leave out examples where a prompt would have more tokens.
        progress: called after every batch.
    """
    subjects = defaultdict(list)
    for index, question in enumerate(results.questions):
        subjects[question.subject].append(index)
    items: list[tuple[Way, int]] = []  # what each item is of

    def groups():
        for subject, indices in subjects.items():
            questions = [results.questions[index] for index in indices]
            for way in WAYS:
                encoded = encode_prompts(
                    questions, examples.get(subject, []), way, tokenizer, chat, max_seq_len
                )
                items.extend((way, index) for index in indices)
                results.examples.extend(count for *_, count in encoded)
                results.too_long += sum(len(p) + max(map(len, e)) > max_seq_len for p, e, _ in encoded)
                yield [Item(prompt, endings) for prompt, endings, _ in encoded]

    for batch in log_likelihoods(model, groups(), parallel):
        for item, logps in batch:
            way, index = items[item]
            results.log_likelihoods[way][index] = logps
        progress()
