"""lm-eval on the exported model agrees with `minimind eval choice`, question by question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_model import in_transformers

from minimind.cli import main
from minimind.evaluate import lm_eval_tasks
from minimind.paths import TOKENIZER_DIR
from minimind.tokenizer import TOKENIZER_FILES
from minimind.weights import load_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
TASKS = Path(lm_eval_tasks.__path__[0])


@pytest.fixture(scope="module")
def exported(out, tmp_path_factory) -> dict[str, Path]:
    """Folders that transformers loads, by stage."""
    folders = {}
    for stage in ("pretrain", "full_sft"):
        folders[stage] = tmp_path_factory.mktemp(stage)
        in_transformers(load_model(out / f"{stage}_64.pth", ""), folders[stage])
        for name in TOKENIZER_FILES:
            shutil.copy(TOKENIZER_DIR / name, folders[stage])
    return folders


def theirs(folder: Path, tasks: list[str], chat: bool, data: dict) -> dict[str, list[dict]]:
    """What lm-eval found for each question, by task."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(
            include_path=str(TASKS), include_defaults=False, metadata=data
        ),
        apply_chat_template=chat,
        batch_size=8,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {task: sorted(results["samples"][task], key=lambda s: s["doc_id"]) for task in tasks}


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize(("stage", "tail"), [("pretrain", ""), ("full_sft", "_chat")])
def test_the_same_log_likelihoods_and_choices(
    stage, tail, shots, exported, questions, examples, flags, tmp_path
):
    path = tmp_path / "results.json"
    more = ["--shots", str(shots), "--examples_path", str(examples), "--max_seq_len", "2048"]
    mode = ["--model_mode", "0" if stage == "pretrain" else "1"]
    assert main(["eval", "choice", str(questions), *flags, *mode, *more, "--json", str(path)]) == 0
    ours = json.loads(path.read_text(encoding="utf-8"))["choice"]

    tasks = [f"minimind_letter{tail}", f"minimind_text{tail}"]
    data = {"questions": str(questions), "examples": str(examples), "shots": shots}
    letter, text = theirs(exported[stage], tasks, bool(tail), data).values()
    assert len(ours["answers"]) == len(letter) == len(text) == 30
    for way, samples in (("letter", letter), ("text", text)):
        for answer, sample in zip(ours["answers"], samples, strict=True):
            found = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
            assert answer[f"log_likelihood_{way}"] == pytest.approx(found, abs=1e-3)
    for score, samples, metric in (
        ("letter", letter, "acc"),
        ("text", text, "acc"),
        ("text per byte", text, "acc_bytes"),
    ):
        right = [float(answer[score] == answer["answer"]) for answer in ours["answers"]]
        assert right == [sample[metric] for sample in samples]
        assert 0 < sum(right) < 30  # the comparison says something
        assert ours["all"][score]["accuracy"] == pytest.approx(sum(right) / 30)
