"""Measure the demo's model on questions it was not trained on.

Everything here is a pure function of questions and answers; how a model answers is the caller's business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from rich.table import Table

from minimind.demo.data import DemoData, Question
from minimind.evaluate.repetition import ends_in_loop
from minimind.evaluate.report import Example, Metric

EXAMPLES = 6  # kept with each metric


def measure(answer: Callable[[list[str]], list[str]], data: DemoData) -> list[Metric]:
    """Ask every held-out question once and score the answers.

    Args:
        answer: maps a batch of questions to as many answers, in order.
        data: what `write_demo_data` returned.
    """

    def ask(questions: list[Question], scored: Callable[[str, str], float]) -> list[Example]:
        return score(questions, answer([q.question for q in questions]), scored)

    arithmetic = ask(data.arithmetic, lambda text, reference: final_number(text) == int(reference))
    addition = [example for example in arithmetic if not _is_subtraction(example.question)]
    subtraction = [example for example in arithmetic if _is_subtraction(example.question)]
    identity = ask(data.identity, lambda text, name: name.lower() in text.lower())
    idioms = ask(data.idioms, character_f1)
    loops = [e._replace(score=float(ends_in_loop(e.answer))) for e in arithmetic + identity + idioms]
    return [
        percentage("Two-digit addition, unseen operands", addition, goal=90),
        percentage("Two-digit subtraction, unseen operands", subtraction, goal=90),
        percentage("Names itself, asked in unseen words", identity, goal=90),
        Metric("Meaning of a taught idiom, character F1", _mean(idioms), 0.8, "", _extremes(idioms)),
        Metric(
            "Answers that end in a repetition loop",
            100 * _mean(loops),
            1,
            "%",
            [example for example in loops if example.score][:EXAMPLES],
            lower_is_better=True,
        ),
    ]


def character_f1(prediction: str, reference: str) -> float:
    """Share of characters in common, 0 to 1 (harmonic mean of precision and recall).

    Order, case, punctuation and white space do not count.
    """
    predicted, expected = (Counter(re.sub(r"[\W_]", "", text.lower())) for text in (prediction, reference))
    total = predicted.total() + expected.total()
    return 2 * (predicted & expected).total() / total if total else 1.0


def final_number(text: str) -> int | None:
    """The last whole number in the text, or None. A minus sign counts where it cannot be a subtraction."""
    numbers = re.findall(r"(?<!\d)-?\d+", text)
    return int(numbers[-1]) if numbers else None


def metrics_table(metrics: list[Metric]) -> Table:
    """The metrics with their goals, for `rich.print`."""
    table = Table("Measured on held-out questions")
    for heading in ("Result", "Goal", ""):
        table.add_column(heading, justify="right")
    for metric in metrics:
        mark = "[green]pass[/]" if metric.passed else "[red]miss[/]"
        table.add_row(metric.name, metric.shown_value, metric.shown_goal, mark)
    return table


def score(
    questions: Sequence[Question], answers: Sequence[str], scored: Callable[[str, str], float]
) -> list[Example]:
    """Each answer with what `scored(answer, reference)` gives it, 0 to 1."""
    return [
        Example(question.question, text, question.answer, float(scored(text, question.answer)))
        for question, text in zip(questions, answers, strict=True)
    ]


def percentage(name: str, examples: list[Example], goal: float) -> Metric:
    """The mean score of the examples in percent."""
    return Metric(name, 100 * _mean(examples), goal, "%", _extremes(examples))


def _mean(examples: list[Example]) -> float:
    return sum(example.score for example in examples) / len(examples) if examples else 0.0


def _extremes(examples: list[Example]) -> list[Example]:
    """The worst and the best answers, half each."""
    ranked = sorted(examples, key=lambda example: example.score)
    return ranked if len(ranked) <= EXAMPLES else ranked[: EXAMPLES // 2] + ranked[-EXAMPLES // 2 :]


def _is_subtraction(question: str) -> bool:
    return "减" in question or "-" in question
