"""`make demo STAGES=all`: what each of the other four stages does to the demo's model.

Each function below runs one stage through its training script, on data that `stage_data` wrote, and measures
the change on what was held out. The figures are shown whatever they are.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from rich.console import Console

from minimind.demo.data import DemoData
from minimind.demo.measure import percentage, score
from minimind.demo.run import answerer, run_script
from minimind.demo.sources import read_sources
from minimind.demo.stage_data import NEW_NAME, StageData, write_stage_data
from minimind.evaluate.report import Example, Metric

if TYPE_CHECKING:
    from minimind.data.records import Kind
    from minimind.train.objective import Objective

TINY = "--preset=tiny --batch_size=8 --accumulation_steps=1 --log_interval=25".split()
LORA = f"--lora_name=lora_{NEW_NAME.lower()} --max_seq_len=256 --epochs=20 --learning_rate=0.003".split()
DPO = "--max_seq_len=256 --epochs=2 --optimizer=muon --learning_rate=0.0005".split()
REASONING = "--max_seq_len=512 --epochs=2 --learning_rate=0.002".split()
STUDENT = (
    "--hidden_size=128 --num_hidden_layers=4 --max_seq_len=256 --batch_size=16 --accumulation_steps=1 "
    "--log_interval=50"
).split()
STUDENT_PRETRAIN = "--epochs=1 --learning_rate=0.005".split()
TEACHER = "--from_weight=pretrain --max_seq_len=256 --epochs=2 --learning_rate=0.003".split()
STUDENT_SFT = "--from_weight=pretrain --epochs=1 --learning_rate=0.003".split()
FORMAT = re.compile(r"<think>\n.+\n</think>\n<answer>\n(-?\d+)\n</answer>", re.DOTALL)


class Results(NamedTuple):
    """What a stage showed, for the terminal and the report."""

    metrics: list[Metric]
    samples: list[tuple[str, str]]  # questions and answers
    runs: list[tuple[str, Path]]  # name and metrics.jsonl of the training


class Demo(NamedTuple):
    """What the stages share."""

    console: Console
    data: DemoData
    stage_data: StageData
    out_dir: Path

    def weights(self, stage: str, size: str = "256") -> Path:
        return self.out_dir / f"{stage}_{size}.pth"

    def run(self, script: str, *argv: str) -> None:
        run_script(self.console, script, [f"--out_dir={self.out_dir}", *argv])

    def with_folder(self, name: str, stage: str) -> Demo:
        """The same in a folder of its own, which has only the weights of `stage` to start from."""
        other = self._replace(out_dir=self.out_dir / name)
        other.out_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.weights(stage), other.weights(stage))
        return other

    def log(self, stage: str, size: str = "256") -> Path:
        path = self.weights(stage, size)
        return path.parent / "runs" / path.stem / "metrics.jsonl"


def other_stages(
    console: Console, data: DemoData, out_dir: Path, timed: Callable[[str, Callable[[], Results]], Results]
) -> Results:
    """Run all four after pretraining and fine-tuning; `timed(name, work)` runs and times a part."""
    folder = data.sft.parent
    novel = read_sources(folder / ".downloads").novel
    demo = Demo(console, data, write_stage_data(folder, novel), out_dir)
    stages = {"LoRA": adapter, "DPO": preferences, "reasoning": reasoning, "distillation": distillation}
    parts = {name: timed(name, partial(stage, demo)) for name, stage in stages.items()}
    return Results(
        metrics=[metric for part in parts.values() for metric in part.metrics],
        samples=[(f"{q} ({name})", answer) for name, part in parts.items() for q, answer in part.samples],
        runs=[run for part in parts.values() for run in part.runs],
    )


def adapter(demo: Demo) -> Results:
    """LoRA gives the model another name; without the adapter it keeps its own."""
    base = demo.weights("full_sft")
    questions = [question.question for question in demo.data.identity]
    before, file_before = answerer(base)(questions), base.read_bytes()
    demo.run("train_lora.py", f"--data_path={demo.stage_data.identity}", *TINY, *LORA)
    name = LORA[0].partition("=")[2]
    with_adapter = answerer(base, [demo.weights(f"lora/{name}")])(questions)
    after = answerer(base)(questions)
    named = [
        Example(question, answer, NEW_NAME, float(NEW_NAME in answer and "MiniMind" not in answer))
        for question, answer in zip(questions, with_adapter, strict=True)
    ]
    same = [Example(q, b, a, float(a == b)) for q, a, b in zip(questions, before, after, strict=True)]
    if base.read_bytes() != file_before:
        same = [example._replace(score=0.0) for example in same]
    return Results(
        [
            percentage("LoRA: gives its new name, asked in unseen words", named, goal=90),
            percentage("LoRA: answers as before without the adapter", same, goal=100),
        ],
        list(zip(questions[:2], with_adapter, strict=False)),
        [("LoRA", demo.log(f"lora/{name}"))],
    )


def preferences(demo: Demo) -> Results:
    """DPO prefers some of the answers that fine-tuning taught alike."""
    pairs = demo.stage_data
    files = [f"--data_path={pairs.pairs}", f"--eval_path={pairs.held_out_pairs}"]
    demo.run("train_dpo.py", *files, *TINY, *DPO)
    before, after = demo.weights("full_sft"), demo.weights("rlhf")
    accuracy = [preference_accuracy(path, pairs.held_out_pairs) for path in (before, after)]
    bits = [text_bits_per_byte(path, demo.data.pretrain_val) for path in (before, after)]
    questions = [question.question for question in demo.data.identity[:6]]
    old, new = (answerer(path)(questions) for path in (before, after))
    changes = [
        Example(question, now, f"before: {then}", float(now != then))
        for question, then, now in zip(questions, old, new, strict=True)
    ]
    demo.console.print(
        f"held-out pairs as preferred: {accuracy[0]:.1%} before, {accuracy[1]:.1%} after; "
        f"held-out text: {bits[0]:.4f} bits per byte before, {bits[1]:.4f} after"
    )
    return Results(
        [
            Metric(
                "DPO: gain in held-out pairs as preferred",
                100 * (accuracy[1] - accuracy[0]),
                15,
                " points",
                changes,
            ),
            Metric(
                "DPO: what it costs in bits per byte of held-out text",
                100 * (bits[1] / bits[0] - 1),
                2,
                "%",
                lower_is_better=True,
            ),
        ],
        list(zip(questions[:1], new, strict=False)),
        [("DPO", demo.log("rlhf"))],
    )


def reasoning(demo: Demo) -> Results:
    """Word problems, with the working written out; and by a twin that was taught the answers alone."""
    data, asked = demo.stage_data, demo.stage_data.word_problems
    demo.run("train_distill_reason.py", f"--data_path={data.reasoning}", *TINY, *REASONING)
    twin = demo.with_folder("without_thinking", "rlhf")
    twin.run("train_full_sft.py", f"--data_path={data.direct}", "--from_weight=rlhf", *TINY, *REASONING)

    questions = [question.question for question in asked]
    thought = answerer(demo.weights("reason"), max_new_tokens=300)(questions)
    direct = answerer(twin.weights("full_sft"))(questions)
    in_format = score(asked, thought, lambda text, _: FORMAT.fullmatch(text) is not None)
    right = score(asked, thought, lambda text, number: FORMAT.sub(r"\1", text) == number)
    right_at_once = score(asked, direct, lambda text, number: text.strip() == number)
    one_more = 100 * sum(example.score for example in right_at_once) / len(asked) + 100 / len(asked)
    return Results(
        [
            percentage("Reasoning: thinks and answers in the exact format", in_format, goal=95),
            percentage("Reasoning: word problems right, goal: more than without", right, goal=one_more),
        ],
        list(zip(questions[:2], thought, strict=False)),
        [("Reasoning", demo.log("reason"))],
    )


def distillation(demo: Demo) -> Results:
    """A student a third the size goes on with a novel, trained on as many tokens with a teacher and without.

    What the fine-tuned model answers is nearly certain, and then a teacher knows no more than the data does.
    How a passage goes on is open: there its probabilities say more than the one word that stands there.
    """
    passages = [
        f"--data_path={demo.stage_data.passages}",
        f"--eval_path={demo.stage_data.held_out_passages}",
    ]
    teacher = demo.with_folder("teacher", "pretrain")
    teacher.run("train_full_sft.py", *passages, *TINY, *TEACHER)
    texts = [f"--data_path={demo.data.pretrain}", f"--eval_path={demo.data.pretrain_val}"]
    student = demo._replace(out_dir=demo.out_dir / "student")
    student.run("train_pretrain.py", *texts, *STUDENT, *STUDENT_PRETRAIN)
    lessons = [*passages, *STUDENT, *STUDENT_SFT]
    student.run("train_full_sft.py", *lessons)
    student.run("train_distillation.py", f"--teacher_path={teacher.weights('full_sft')}", *lessons)
    alone, taught = (last_bits_per_byte(student.log(stage, "128")) for stage in ("full_sft", "full_dist"))
    return Results(
        [
            Metric(
                "Distillation: student's held-out bits per byte, goal: as without",
                taught,
                alone,
                "",
                lower_is_better=True,
            )
        ],
        [],
        [
            ("Student, alone", student.log("full_sft", "128")),
            ("Student, taught", student.log("full_dist", "128")),
        ],
    )


def preference_accuracy(weights: Path, pairs: Path) -> float:
    """Share of the pairs whose chosen answer the model gives more probability than the rejected one."""
    from minimind.train.preference import Preference

    return _evaluate(Preference(beta=0.1), "preference", weights, pairs)["eval_accuracy"]


def text_bits_per_byte(weights: Path, texts: Path) -> float:
    from minimind.train.objective import NextToken

    return _evaluate(NextToken(), "pretrain", weights, texts)["eval_bpb"]


def _evaluate(objective: Objective, kind: Kind, weights: Path, path: Path) -> dict[str, float]:
    """What `objective` measures on a whole data file."""
    from minimind.data.prepare import prepare
    from minimind.tokenizer import Tokenizer
    from minimind.train.datasets import rows_of
    from minimind.train.parallel import setup
    from minimind.weights import load_model

    tokenizer, parallel = Tokenizer.load(), setup("auto", "auto")
    data = rows_of(prepare(path, kind, tokenizer, progress=False), tokenizer, max_seq_len=256)
    model = load_model(weights, "make demo").to(parallel.device)
    return objective.evaluate(model, data, tokenizer, parallel, 16, None)


def last_bits_per_byte(log: Path) -> float:
    """The last measurement on held-out records in a run's `metrics.jsonl`, which is of all of them."""
    lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    return [line["eval_bpb"] for line in lines if "eval_bpb" in line][-1]
