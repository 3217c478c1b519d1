"""A small random model in an `out/` folder, and questions with all that texts can begin and end with."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from test_model import random_model

from minimind.config import ModelConfig
from minimind.weights import save_weights

SHAPE = ModelConfig(hidden_size=64, num_hidden_layers=2)
PIECES = [
    "（一）",
    "“引语”",
    "16～17天",
    "37.8°C",
    "a long English option",
    "甲",
    "我国的首都",
    "\\frac{1}{2}",
    "：",
    "《论语》",
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def make_questions(count: int, seed: int) -> list[dict]:
    """`count` questions in each of two subjects; the benchmark's real fields, text of no meaning."""
    rng = random.Random(seed)
    records = []
    for subject in ("agronomy", "virology"):
        for _ in range(count):
            options = rng.sample(PIECES, 4)
            question = "".join(rng.choices(PIECES, k=rng.randint(1, 6))) + rng.choice(
                ["（）", "是", "?", " "]
            )
            records.append(
                {"subject": subject, "question": question, **dict(zip("ABCD", options, strict=True))}
                | {"answer": rng.choice("ABCD")}
            )
    return records


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("questions") / "exam_test.jsonl", make_questions(15, 0))


@pytest.fixture(scope="session")
def examples(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("examples") / "exam_dev.jsonl", make_questions(3, 1))


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """Weights of two stages."""
    folder = tmp_path_factory.mktemp("out")
    for seed, stage in enumerate(("pretrain", "full_sft")):
        save_weights(random_model(SHAPE, seed), folder / f"{stage}_64.pth")
    return folder


@pytest.fixture
def flags(out, monkeypatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["minimind"])
    return ["--out_dir", str(out), "--device", "cpu", "--dtype", "float32"]
