"""`minimind eval choice`: the questions of C-Eval and CMMLU."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.errors import UserError
from minimind.evaluate.options import INTERRUPTED, EvalOptions, progress_bar, say
from minimind.flags import REQUIRED, flag, parse_flags

if TYPE_CHECKING:
    from rich.table import Table

    from minimind.evaluate.choice import Results
    from minimind.evaluate.questions import Question


@dataclass(frozen=True)
class ChoiceOptions(EvalOptions):
    files: tuple[Path, ...] = flag(REQUIRED, "questions of C-Eval or CMMLU, .jsonl or .csv", positional=True)
    shots: int = flag(0, "solved examples of the subject before each question")
    examples_path: Path | None = flag(None, "file that has them: the benchmark's dev part")
    limit: int | None = flag(None, "ask only the first so many questions of each subject")
    chat: bool | None = flag(None, "ask through the chat template; without it all weights but pretrain")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shots <= 100:
            raise UserError(f"--shots is {self.shots}; it must be 0 to 100")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be at least 1")
        if self.shots and not self.examples_path:
            raise UserError(
                f"--shots {self.shots} needs --examples_path, the file with the examples (the benchmark's "
                "dev part); examples out of the questions themselves would tell answers"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Multiple-choice questions in the format of C-Eval and CMMLU, scored by log-likelihood.

    The model never writes anything: what counts is which letter, and which option, it finds likeliest. Every
    accuracy comes with its 95 % interval (Wilson), and says whether chance would do as well.

        minimind eval choice dataset/cmmlu_test.jsonl
        minimind eval choice dataset/cmmlu_test.jsonl --shots 5 --examples_path dataset/cmmlu_dev.jsonl
    """
    options = parse_flags(ChoiceOptions, argv, inspect.getdoc(main))
    from minimind.evaluate.questions import examples_by_subject, read_questions

    questions = [question for path in options.files for question in read_questions(path)]
    questions = list(first_of_each_subject(questions, options.limit))
    examples = {}
    if options.shots and options.examples_path:
        subjects = list(dict.fromkeys(question.subject for question in questions))
        examples = examples_by_subject(options.examples_path, subjects, options.shots)
    loaded = options.load()
    from minimind.evaluate.choice import Results, ask

    results = Results(questions)
    chat = loaded.answers if options.chat is None else options.chat
    code = 0
    try:
        with progress_bar("questions", len(questions)) as show:
            ask(
                loaded.model,
                loaded.tokenizer,
                loaded.parallel,
                results,
                examples=examples,
                chat=chat,
                max_seq_len=loaded.max_seq_len,
                progress=lambda: show(len(results.log_likelihoods["text"])),
            )
    except KeyboardInterrupt:
        code = INTERRUPTED
        say(f"stopped after {len(results.answered):,} of {len(questions):,} questions; they give:")
    show_choice(results, options.shots, loaded.max_seq_len)
    if code == 0:
        asked = {"shots": options.shots, "chat": chat, "limit": options.limit}
        options.write_json(loaded, {"choice": asked | choice_table(results)})
    elif options.json:
        say(f"{options.json} is not written: not all questions were asked")
    return code


def first_of_each_subject(questions: Iterable[Question], limit: int | None) -> Iterator[Question]:
    """The first `limit` questions of each subject."""
    counts: Counter[str] = Counter()
    for question in questions:
        counts[question.subject] += 1
        if limit is None or counts[question.subject] <= limit:
            yield question


def show_choice(results: Results, shots: int, max_seq_len: int) -> None:
    from rich.console import Console

    from minimind.evaluate.choice import CHANCE, SCORES

    answered = results.answered
    if not answered:
        return
    console = Console(highlight=False, markup=False)  # subjects are somebody's words
    if not console.is_terminal:
        console.width = 100
    table, outside, subjects = subject_table(results)
    console.print(table)
    for score in SCORES:
        accuracy = results.accuracy(score, answered)
        console.print(f"{score + ':':<15}{accuracy} % of {accuracy.total:,}: {results.verdict(score)}")
    unread = ", ".join(f"{rule} {100 * share.value:.1f} %" for rule, share in results.unread().items())
    console.print(f"without reading the question: {unread}")
    chosen = ", ".join(f"{letter} {share:.0%}" for letter, share in results.letters_chosen().items())
    console.print(f"letters taken: {chosen}")
    console.print(
        f"chance: {100 * CHANCE:.1f} %; brackets: 95 % intervals (Wilson)\n{outside} of the {2 * subjects} "
        f"intervals of subjects leave chance out (+ above, - below); about {0.1 * subjects:.1f} would anyway",
        soft_wrap=True,
    )
    if shots and min(results.examples) < shots:
        mean = sum(results.examples) / len(results.examples)
        say(f"of {shots} examples {mean:.1f} on average fit before a question into {max_seq_len} tokens")
    if results.too_long:
        say(f"{results.too_long:,} prompts are longer than the {max_seq_len} tokens the model is used to")


def subject_table(results: Results) -> tuple[Table, int, int]:
    """The table, how many of its intervals leave out chance, and how many subjects it has."""
    from rich.table import Table

    from minimind.evaluate.choice import CHANCE

    table = Table("subject")
    for heading in ("questions", "letter, %", "text per byte, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    marks = {"better than chance": " +", "worse than chance": " -", "indistinguishable from chance": "  "}
    outside = 0
    by_subject = results.by_subject()
    for name, indices in by_subject.items():
        accuracies = [results.accuracy(score, indices) for score in ("letter", "text per byte")]
        outside += sum(marks[a.against(CHANCE)] != "  " for a in accuracies)
        table.add_row(name, f"{len(indices):,}", *(f"{a}{marks[a.against(CHANCE)]}" for a in accuracies))
    return table, outside, len(by_subject)


def choice_table(results: Results) -> dict[str, Any]:
    """All of it, for JSON."""
    from minimind.evaluate.choice import CHANCE, SCORES
    from minimind.evaluate.questions import LETTERS

    def accuracies(indices: Sequence[int]) -> dict[str, Any]:
        found = {score: results.accuracy(score, indices) for score in SCORES}
        return {
            score: {"accuracy": a.value, "interval": a.interval, "verdict": a.against(CHANCE)}
            for score, a in found.items()
        }

    return {
        "questions": len(results.answered),
        "chance": CHANCE,
        "interval": "Wilson, 95 %",
        "examples_mean": sum(results.examples) / len(results.examples),
        "all": accuracies(results.answered),
        "unread": {rule: share.value for rule, share in results.unread().items()},
        "letters_chosen": results.letters_chosen(),
        "subjects": {
            name: {"questions": len(indices)} | accuracies(indices)
            for name, indices in results.by_subject().items()
        },
        "answers": [
            {
                "file": results.questions[i].file,
                "line": results.questions[i].line,
                "answer": LETTERS[results.questions[i].answer],
                **{score: LETTERS[results.choice(score, i)] for score in SCORES},
                **{f"log_likelihood_{way}": found[i] for way, found in results.log_likelihoods.items()},
            }
            for i in results.answered
        ],
    }
