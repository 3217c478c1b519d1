"""Reasoning distillation: what the tags weigh, what it starts from, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.stages import reason
from minimind.stages.reason import ReasonOptions
from minimind.tokenizer import Tokenizer
from minimind.train import loop
from minimind.train.start import identity
from minimind.weights import load_model, save_weights

from .conftest import metrics, run, write_jsonl

TAG_WEIGHT = 7
RECORDS = [
    {
        "conversations": [
            {"role": "user", "content": f"<think> {a}加{b}等于几？"},
            {
                "role": "assistant",
                "content": f"<think>\nI think {a}+{b}={a + b}\n</think>\n<answer>\n{a + b}\n</answer>",
            },
        ]
    }
    for a in range(5)
    for b in range(5)
]


@pytest.fixture
def stage(monkeypatch) -> loop.Stage:
    """The stage as the command makes it."""
    stages = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda stage, _: stages.append(stage) or 0)
        assert reason.main(["--tag_weight", str(TAG_WEIGHT)]) == 0
    return stages[0]


@pytest.fixture
def reason_options(options, tmp_path) -> ReasonOptions:
    data = write_jsonl(tmp_path / "sums.jsonl", RECORDS)
    return replace(ReasonOptions(**vars(options)), data_path=data, max_seq_len=96)


def save_random(path, seed: int = 0, num_experts: int = 0) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_experts=num_experts)
    save_weights(MiniMind(config), path)


def reference(model: MiniMind) -> float:
    """Σ w·nll / Σ w of `RECORDS` in float64, one conversation at a time."""
    tokenizer = Tokenizer.load()
    nats = weights = 0.0
    for record in RECORDS:
        question, answer = record["conversations"]
        prompt = tokenizer.encode_chat([question], add_generation_prompt=True)[0]
        target = [*tokenizer.encode(answer["content"]), tokenizer.eos_id]
        logits = model(torch.tensor([prompt + target[:-1]])).logits[0, -len(target) :]
        losses = F.cross_entropy(logits.double(), torch.tensor(target), reduction="none")
        rest = re.sub("</?(think|answer)>", lambda tag: "#" * len(tag[0]), answer["content"])
        for token, nll in zip(target, losses.tolist(), strict=True):
            length = len(tokenizer.token_bytes[token])
            weight = TAG_WEIGHT if "#" in rest[:length] else 1
            nats, weights, rest = nats + weight * nll, weights + weight, rest[length:]
    return nats / weights


@pytest.mark.parametrize(("batch_size", "passes"), [(64, 1), (4, 16)])
def test_the_loss_is_the_weighted_mean_over_the_step(reason_options, stage, batch_size, passes):
    start = reason_options.out_dir / "full_sft_64.pth"
    save_random(start)
    options = replace(reason_options, batch_size=batch_size, accumulation_steps=passes, max_steps=1)
    trainer = run(options, stage)
    assert trainer.shares.steps_per_epoch == 1  # all records are in the step
    assert metrics(trainer)[0] == pytest.approx(reference(load_model(start, "")), rel=1e-5)


def test_preferences_come_first_and_the_name_is_reason(reason_options, stage, capsys):
    for seed, name in enumerate(("full_sft", "rlhf")):
        save_random(reason_options.out_dir / f"{name}_64.pth", seed)
    trainer = run(replace(reason_options, max_steps=2), stage)
    assert trainer.started_from.name == "rlhf_64.pth"
    assert trainer.weights_path.name == "reason_64.pth"
    assert identity(trainer)["tag_weight"] == reason_options.tag_weight


def test_experts_reason_too(reason_options, stage):
    save_random(reason_options.out_dir / "full_sft_64_moe.pth", num_experts=4)
    trainer = run(replace(reason_options, use_moe=True, max_steps=2), stage)
    assert trainer.weights_path.name == "reason_64_moe.pth"
    assert metrics(trainer, "balance_loss")[-1] >= 0.99


def test_without_weights_the_command_for_fine_tuning_is_named(reason_options, stage):
    with pytest.raises(UserError, match=r"full_sft_64\.pth.*train_full_sft\.py --hidden_size 64"):
        run(reason_options, stage)


def test_what_does_not_fit_is_counted_and_nothing_left_is_a_sentence(reason_options, stage, capsys):
    save_random(reason_options.out_dir / "full_sft_64.pth")
    long = {"conversations": [RECORDS[0]["conversations"][0], dict(RECORDS[0]["conversations"][1])]}
    long["conversations"][1]["content"] = f"<think>{'很长' * 200}</think><answer>2</answer>"
    write_jsonl(reason_options.data_path, [*RECORDS, long])
    run(replace(reason_options, max_steps=1), stage)
    assert "1 are left out since no answer fits" in capsys.readouterr().out
    write_jsonl(reason_options.data_path, [long])
    with pytest.raises(UserError, match="no record fits into --max_seq_len 96"):
        run(reason_options, stage)


def test_an_answer_without_its_tags_is_named(reason_options, stage):
    save_random(reason_options.out_dir / "full_sft_64.pth")
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    write_jsonl(reason_options.data_path, [RECORDS[0], {"conversations": messages}])
    with pytest.raises(UserError, match=r"sums\.jsonl:2: conversations\[1\]\.content: is not <think>"):
        run(reason_options, stage)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_of_the_tags_is_a_positive_number(weight):
    with pytest.raises(UserError, match=f"--tag_weight is {weight}; it must be above 0"):
        ReasonOptions(tag_weight=weight)
