"""`minimind estimate` against runs and a hand calculation, and what a run says it took."""

from __future__ import annotations

import json
import re
import sys

import pytest

from minimind import estimate
from minimind.cli import main
from minimind.errors import UserError
from minimind.train import loop, step
from minimind.train.checkpoint import list_checkpoints, load_state

FLAGS = "--hidden_size 64 --num_hidden_layers 2 --max_seq_len 64 --batch_size 4 --device cpu --dtype float32"


@pytest.fixture
def minimind(tmp_path, monkeypatch, capsys):
    """Run a command on a little data of the right kind; returns what it printed."""
    monkeypatch.setattr(loop, "matmul_rate", lambda *_: 1e10)
    talk = [
        [{"role": "user", "content": f"{i}加{i}？"}, {"role": "assistant", "content": f"{i + i}"}]
        for i in range(150)
    ]
    records = {
        "texts": [{"text": "春天来了。" * (1 + i % 9)} for i in range(300)],
        "chats": [{"conversations": messages} for messages in talk],
        "pairs": [{"chosen": t, "rejected": [t[0], t[1] | {"content": "不知道"}]} for t in talk],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def run(command: str, data: str, *flags: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["minimind"])
        arguments = [*command.split(), "--data_path", str(tmp_path / f"{data}.jsonl"), *FLAGS.split(), *flags]
        assert main([*arguments, "--compile", "0", "--out_dir", str(tmp_path / "out")]) == code
        return capsys.readouterr().out

    return run


def planned(said: str) -> tuple[int, int]:
    """Tokens and steps that an estimate speaks of."""
    found = re.search(r"([\d,]+) in all, ([\d,]+) steps", said)
    return tuple(int(number.replace(",", "")) for number in found.groups())


def seconds(said: str, before: str) -> float:
    number, unit = re.search(rf"{before}([\d.]+) (s|min|h)\b", said).groups()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


@pytest.mark.parametrize("flags", [["--epochs", "3"], ["--epochs", "2", "--max_steps", "11"]])
def test_an_estimate_is_what_the_run_takes(minimind, tmp_path, flags):
    said = minimind("estimate pretrain", "texts", *flags, "--price_per_hour", "3600")
    assert not (tmp_path / "out").exists()
    assert "it fits" in said
    assert float(re.search(r"¥([\d.]+) at ¥3600 an hour", said)[1]) > 0

    took = minimind("train pretrain", "texts", *flags, "--price_per_hour", "3600")
    run = json.loads((tmp_path / "out" / "runs" / "pretrain_64" / "run.json").read_text())
    cost = run["cost"]
    assert planned(said) == (cost["tokens"], run["total_steps"])
    assert cost["money"] == pytest.approx(cost["seconds"])
    assert f"{cost['tokens']:,} tokens in" in took
    assert f"¥{cost['money']:.2f} at ¥3600 an hour" in took
    assert f"peak memory {cost['peak_memory'] / 1e9:.2f} GB on {cost['device']}" in took
    assert 0.1 < (seconds(said, "time: ") + 1) / (cost["seconds"] + 1) < 10


def test_a_run_that_was_resumed_counts_all_its_parts(minimind, tmp_path, monkeypatch):
    minimind("train pretrain", "texts", "--save_interval", "2")
    run_file = tmp_path / "out" / "runs" / "pretrain_64" / "run.json"
    whole = json.loads(run_file.read_text())["cost"]
    assert whole["money"] is None
    list_checkpoints(run_file.parent / "checkpoints")[-1].with_suffix(".sha256").unlink()
    minimind("train pretrain", "texts", "--save_interval", "2", "--from_resume", "1")
    resumed = json.loads(run_file.read_text())["cost"]
    assert resumed["tokens"] == whole["tokens"]
    saved = load_state(list_checkpoints(run_file.parent / "checkpoints")[-1])
    assert saved["spent"][0] > whole["seconds"] / 2  # what was before the resume is in it


@pytest.mark.parametrize(
    ("stage", "data", "flags"),
    [
        ("sft", "chats", []),
        ("lora", "chats", ["--epochs", "1"]),
        ("dpo", "pairs", []),
        ("distill", "chats", ["--teacher_preset", "tiny", "--max_steps", "3"]),
    ],
)
def test_stages_are_estimated_before_those_they_start_from(minimind, tmp_path, stage, data, flags):
    said = minimind(f"estimate {stage}", data, *flags)
    tokens, steps = planned(said)
    assert tokens > steps > 0
    assert "money: unknown without --price_per_hour" in said
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_computed_as_by_hand(minimind, monkeypatch):
    monkeypatch.setattr(step, "optimizer_step", lambda *_: pytest.fail("no steps are needed"))
    flags = ["--gpu", "3090", "--preset", "small", "--hidden_size", "512", "--num_hidden_layers", "8"]
    said = minimind("estimate pretrain", "texts", *flags, "--epochs", "200", "--dtype", "auto")
    tokens, _ = planned(said)
    # 6 for each of 25,829,888 parameters and each token; 71 TFLOP/s of which 35 % are reached
    by_hand = 6 * 25_829_888 * tokens / (71e12 * 0.35)
    assert seconds(said, "time: ") == pytest.approx(by_hand, abs=0.5)
    assert "71 TFLOP/s (bf16, dense)" in said
    assert "assumed that training reaches 35%" in said
    assert f"¥{1.3 * by_hand / 3600:.2f} at ¥1.3 an hour" in said
    # Muon: weight, gradient and momentum in fp32; AdamW, for 6,400 embeddings of 512 numbers, two averages
    assert f"memory: {(12 * 25_829_888 + 4 * 6400 * 512) / 1e9:.2f} GB of 24 GB" in said
    automatic = minimind("estimate pretrain", "texts", *flags, "--batch_size", "auto", "--dtype", "auto")
    assert "--batch_size auto:" not in automatic  # nothing is tried out for a card that is not here


def test_preference_pays_for_the_scores_beforehand(minimind):
    flops = []
    for epochs in ("1", "2"):
        said = minimind("estimate dpo", "pairs", "--gpu", "4090", "--epochs", epochs, "--dtype", "auto")
        flops.append(float(re.search(r"for ([\d.e+]+) floating", said)[1]))
    assert flops[1] / flops[0] == pytest.approx((2 + 1 / 3) / (1 + 1 / 3), rel=0.01)


def test_what_estimate_refuses(minimind, capsys):
    with pytest.raises(UserError, match="computed for bf16 products; leave out --dtype float32"):
        minimind("estimate pretrain", "texts", "--gpu", "H100")
    with pytest.raises(UserError, match="--price_per_hour is -1"):
        minimind("estimate pretrain", "texts", "--price_per_hour", "-1")
    for wrong in ([], ["pretrian"], ["sft", "--gpu", "1080"]):
        with pytest.raises(SystemExit) as ended:
            main(["estimate", *wrong])
        assert ended.value.code == 2
    with pytest.raises(SystemExit):
        main(["estimate", "sft", "--epoch", "1"])
    assert "sft: error: unrecognized arguments: --epoch 1; did you mean --epochs?" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_said_so(minimind, monkeypatch):
    monkeypatch.setitem(estimate.GPUS, "3060", estimate.GPU(25.5, 0))
    said = minimind("estimate pretrain", "texts", "--gpu", "3060", "--dtype", "auto", code=1)
    assert "it does not fit" in said
