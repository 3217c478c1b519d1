"""A little data and a very small model, so that whole training runs take a second."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.stages.pretrain import PretrainOptions
from minimind.stages.sft import SFTOptions
from minimind.train import loop, samples
from minimind.train.loop import Stage, Trainer
from minimind.train.parallel import setup

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "max_seq_len": 64}
PRETRAIN = Stage("pretrain", data_kind="pretrain")
SFT = Stage("full_sft", data_kind="conversation", starts_from=("pretrain",))


@pytest.fixture(autouse=True)
def quick_around_the_training(monkeypatch) -> None:
    """Measuring the processor, and long answers at the end, take longer than these runs."""
    monkeypatch.setattr(loop, "matmul_rate", lambda *_: 1e10)
    monkeypatch.setattr(samples, "TOKENS", 4)


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """220 short texts, more than enough for some to be held out."""
    rng = random.Random(0)
    words = ["春天", "夏天", "秋天", "冬天", "太阳", "月亮", "山", "水", "来了", "走了", "很好", "one", "two"]
    records = [{"text": "".join(rng.choices(words, k=rng.randint(5, 40)))} for _ in range(220)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", records)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    records = [
        {
            "conversations": [
                {"role": "user", "content": f"{a}加{b}等于几？"},
                {"role": "assistant", "content": f"{a}+{b}={a + b}"},
            ]
        }
        for a in range(10)
        for b in range(10)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", records)


@pytest.fixture
def options(texts, tmp_path) -> PretrainOptions:
    """A run of 7 steps in fp32 on one CPU."""
    return PretrainOptions(
        data_path=texts,
        out_dir=tmp_path / "out",
        batch_size=4,
        accumulation_steps=2,
        learning_rate=3e-3,
        dtype="float32",
        compile="0",
        device="cpu",
        max_steps=7,
        log_interval=1000,
        **SIZE,
    )


@pytest.fixture
def sft_options(conversations, options) -> SFTOptions:
    return replace(SFTOptions(**vars(options)), data_path=conversations, epochs=1)


def run(options, stage: Stage = PRETRAIN) -> Trainer:
    """Train; returns the trainer with the trained model in it."""
    trainer = Trainer(stage, options, setup(options.device, options.dtype))
    trainer.exit_code = trainer.run()
    return trainer


def metrics(trainer: Trainer, key: str = "loss") -> list[float]:
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()
