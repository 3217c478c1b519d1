"""The questions of a file as lm-eval wants them, each with the solved examples of its subject before it."""

from __future__ import annotations

from pathlib import Path

import datasets

from minimind.errors import UserError
from minimind.evaluate.questions import examples_by_subject, read_questions


def load(
    questions: str, examples: str | None = None, shots: int = 0, **_: object
) -> dict[str, datasets.Dataset]:
    """What lm-eval calls with a task's metadata. Raises: UserError for shots without a file of examples."""
    asked = read_questions(Path(questions))
    subjects = list(dict.fromkeys(question.subject for question in asked))
    solved = {}
    if shots:
        if examples is None:
            raise UserError("the task's metadata have shots and no examples; name the benchmark's dev file")
        solved = examples_by_subject(Path(examples), subjects, shots)
    rows = [
        {
            "subject": question.subject,
            "question": question.text,
            **dict(zip("ABCD", question.options, strict=True)),
            "answer": question.answer,
            **{
                f"{way}_examples": "".join(e.solved(way) for e in solved.get(question.subject, []))
                for way in ("letter", "text")
            },
        }
        for question in asked
    ]
    return {"test": datasets.Dataset.from_list(rows)}
