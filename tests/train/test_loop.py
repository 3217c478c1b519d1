"""Whole training runs on a small model: what they compute, save, survive and say."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.errors import UserError
from minimind.paths import ROOT
from minimind.train import loop
from minimind.train.checkpoint import STATE, list_checkpoints, load_state
from minimind.train.objective import Loss, NextToken
from minimind.weights import load_model

from .conftest import PRETRAIN, SFT, SIZE, metrics, run, weights, write_jsonl


def assert_equal_weights(a, b) -> None:
    assert all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


def stop_after(step: int, monkeypatch) -> None:
    """Deliver a SIGTERM to this process when `step` steps are done."""
    monitor_step = loop.Monitor.step

    def step_and_stop(self, done, values):
        monitor_step(self, done, values)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Monitor, "step", step_and_stop)


def test_a_run_learns_and_leaves_what_it_promises(options):
    trainer = run(replace(options, max_steps=None, epochs=6))
    losses = metrics(trainer)
    assert losses[0] == pytest.approx(8.76, abs=0.1)  # ln 6400
    assert losses[-1] < 5
    bits = metrics(trainer, "eval_bpb")
    assert len(bits) >= 3
    assert bits[-1] < bits[0]
    saved = torch.load(trainer.weights_path, weights_only=True)
    assert trainer.weights_path.name == "pretrain_64.pth"
    assert all(t.dtype == torch.float16 for t in saved.values())
    # The last steps are in the file although their number is no multiple of any interval.
    torch.testing.assert_close(
        load_model(trainer.weights_path, "").state_dict(), weights(trainer), atol=2e-3, rtol=1e-3
    )
    settings = json.loads((trainer.run_dir / "run.json").read_text(encoding="utf-8"))
    assert settings["parameters"] == trainer.model.num_parameters
    assert not list(trainer.options.out_dir.rglob("*.tmp"))


def test_a_small_set_can_be_learnt_by_heart(options, tmp_path):
    data = write_jsonl(tmp_path / "one.jsonl", [{"text": "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"}])
    options = replace(options, data_path=data, epochs=150, max_steps=None, learning_rate=1e-2)
    assert metrics(run(options))[-1] < 0.05


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_split_into_batches_does_not_matter(options, tmp_path, use_moe):
    runs = [
        run(
            replace(
                options,
                batch_size=size,
                accumulation_steps=passes,
                out_dir=tmp_path / str(size),
                use_moe=use_moe,
            )
        )
        for size, passes in ((8, 1), (4, 2), (1, 8))
    ]
    for other in runs[1:]:
        assert metrics(other) == pytest.approx(metrics(runs[0]), rel=2e-5)


def test_the_split_does_not_matter_where_targets_are_uneven(options, sft_options, tmp_path):
    run(options)
    runs = [
        run(replace(sft_options, batch_size=size, accumulation_steps=8 // size, max_steps=3), SFT)
        for size in (8, 2)
    ]
    assert metrics(runs[1]) == pytest.approx(metrics(runs[0]), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(options, tmp_path, monkeypatch, optimizer, use_moe):
    options = replace(options, optimizer=optimizer, use_moe=use_moe, dtype="bfloat16", epochs=2)
    whole = run(replace(options, out_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        stopped = run(options)
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert len(metrics(stopped)) == 3
    resumed = run(replace(options, from_resume=True))
    assert resumed.exit_code == 0
    assert metrics(resumed) == metrics(whole)
    assert_equal_weights(resumed, whole)


def test_resuming_a_finished_run_restores_its_weight_file(options):
    first = run(options)
    expected = first.weights_path.read_bytes()
    first.weights_path.unlink()
    again = run(replace(options, from_resume=True))
    assert again.weights_path.read_bytes() == expected
    assert metrics(again) == metrics(first)


def test_resuming_another_run_is_refused(options, texts, tmp_path):
    run(options)
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, is 0\.001"):
        run(replace(options, from_resume=True, learning_rate=1e-3))
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "别的文字"}] * 200)
    with pytest.raises(UserError, match="data"):
        run(replace(options, from_resume=True, data_path=other))
    with pytest.raises(UserError, match="another run: from_weight was None, is pretrain"):
        run(replace(options, from_resume=True, from_weight="pretrain"))


def test_fine_tuning_refuses_the_weights_of_another_tokenizer(options, sft_options):
    start = run(options)
    settings = start.run_dir / "run.json"
    other = json.loads(settings.read_text()) | {"tokenizer_fingerprint": "another"}
    settings.write_text(json.dumps(other))
    with pytest.raises(UserError, match="another tokenizer"):
        run(sft_options, SFT)


def test_weights_that_no_stage_is_known_for_are_not_guessed(options):
    run(options)
    with pytest.raises(UserError, match=r"--from_weight sft: there is no .*; there are: pretrain"):
        run(replace(options, from_weight="sft"))


@pytest.mark.parametrize("size", [{"num_hidden_layers": 10**9}, {"hidden_size": 8 * 10**12}])
def test_weights_that_no_memory_holds_are_a_sentence(options, size):
    with pytest.raises(
        UserError, match=r"layers of width .* take .* GB, but cpu has .* GB; lower --num_hidd"
    ):
        run(replace(options, **size))


def test_too_little_memory_is_a_sentence(options, monkeypatch):
    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    monkeypatch.setattr(loop, "optimizer_step", exhausted)
    with pytest.raises(UserError, match="not enough memory on cpu; lower --batch_size"):
        loop.train(PRETRAIN, options)


def test_a_damaged_checkpoint_is_passed_over(options, capsys):
    whole = run(replace(options, save_interval=3))
    _, newest = list_checkpoints(whole.run_dir / "checkpoints")
    flipped = bytearray((newest / STATE).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (newest / STATE).write_bytes(flipped)
    resumed = run(replace(options, save_interval=3, from_resume=True))
    out = capsys.readouterr().out
    assert f"{newest} is damaged" in out
    assert "resumed at step 6" in out
    assert metrics(resumed) == metrics(whole)
    for path in list_checkpoints(whole.run_dir / "checkpoints"):
        (path / STATE).write_bytes(b"cut short")
    with pytest.raises(UserError, match="all checkpoints"):
        run(replace(options, from_resume=True))


def test_checkpoints_hold_fp32_weights(options):
    trainer = run(options)
    state = load_state(list_checkpoints(trainer.run_dir / "checkpoints")[-1])
    assert all(t.dtype == torch.float32 for t in state["model"].values())
    assert all(torch.equal(t, weights(trainer)[n]) for n, t in state["model"].items())


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loss_that_is_no_number_is_left_out_and_its_records_named(options, passes, capsys):
    """One record poisons the loss: the steps with it do nothing, and the message names its line."""
    lines = options.data_path.read_text(encoding="utf-8").splitlines()

    class Poisoned(NextToken):
        def loss(self, model, batch, balance_coef):
            loss = super().loss(model, batch, balance_coef)
            bad = (batch.input_ids == marker).any()
            return Loss(*(loss.total * float("nan"), loss.logged * float("nan"), {}) if bad else loss)

    from minimind.tokenizer import Tokenizer

    data = options.data_path.with_name("poisoned.jsonl")
    records = [json.loads(line) for line in lines]
    records[50] = {"text": records[50]["text"] + "Ω"}
    write_jsonl(data, records)
    marker = Tokenizer.load().encode("Ω")[-1]
    stage = replace(PRETRAIN, objective=Poisoned())
    given = replace(
        options, data_path=data, batch_size=16 // passes, accumulation_steps=passes, max_steps=None, epochs=3
    )
    trainer = run(replace(given, save_interval=1), stage)
    out = capsys.readouterr().out
    named = re.findall(r"step (\d+) is left out: .* not finite; learning rate .* lines ([\d, ]+)", out)
    assert len(named) == 3  # once an epoch
    assert all("51" in lines.split(", ") for _, lines in named)
    assert trainer.stability.skipped == 3
    left_out = {int(step) for step, _ in named}
    entries = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {e["step"] for e in entries if "lr" in e and "loss" not in e} == left_out
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_texts_that_are_split_are_told_to_lose_nothing(options, capsys):
    trainer = run(options)
    told = f"data: {trainer.data.report.split} texts were split, over two rows or more; nothing is lost"
    assert trainer.data.report.split > 0
    assert told in capsys.readouterr().out


def test_moe_trains_and_logs_its_experts(options):
    trainer = run(replace(options, use_moe=True))
    assert trainer.weights_path.name == "pretrain_64_moe.pth"
    loads = [metrics(trainer, f"expert_load/{i}")[-1] for i in range(4)]
    assert sum(loads) == pytest.approx(1.0, abs=1e-5)
    assert metrics(trainer, "balance_loss")[-1] >= 0.99


def test_fine_tuning_starts_from_pretraining_and_trains_answers_only(options, sft_options):
    with pytest.raises(UserError, match=r"pretrain_64\.pth; make them with: python trainer/train_pretrain"):
        run(sft_options, SFT)
    start = run(options)
    trainer = run(sft_options, SFT)
    batch = trainer.data.batch(0, 0, 4)
    text = trainer.tokenizer.decode(
        batch.labels.flatten()[batch.targets_at].tolist(), skip_special_tokens=False
    )
    assert re.fullmatch(r"(\d\+\d=\d+<\|im_end\|>)+", text)
    assert weights(trainer)["model.embed_tokens.weight"].std() > 0
    assert metrics(trainer)[0] < 12
    assert load_model(start.weights_path, "").num_parameters == trainer.model.num_parameters


def test_precision_is_what_was_asked_for(options, monkeypatch):
    seen = set()

    class Watch(NextToken):
        def loss(self, *arguments):
            seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return super().loss(*arguments)

    stage = replace(PRETRAIN, objective=Watch())
    for dtype in ("bfloat16", "float32"):
        trainer = run(replace(options, dtype=dtype, max_steps=1), stage)
        assert seen == {getattr(torch, dtype)}
        assert not trainer.engine.scaler.is_enabled()
        seen.clear()
    with pytest.raises(UserError, match="float16 does not work on a CPU"):
        run(replace(options, dtype="float16"))


def test_bad_values_get_a_sentence(options, tmp_path):
    with pytest.raises(UserError, match="--batch_size is 0"):
        replace(options, batch_size=0)
    for name, value in (
        ("learning_rate", float("nan")),
        ("weight_decay", float("nan")),
        ("grad_clip", float("inf")),
        ("warmup_iters", -1),
        ("seed", -1),
        ("max_seq_len", 100_000),
        ("eval_interval", 0),
    ):
        with pytest.raises(UserError, match=f"--{name} is {value}; it must"):
            replace(options, **{name: value})
    with pytest.raises(UserError, match="--learning_rate"):
        replace(options, learning_rate=-1.0)
    with pytest.raises(UserError, match="there is no data at"):
        run(replace(options, data_path=tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="sees 0 CUDA"):
        run(replace(options, device="cuda:7"))
    with pytest.raises(UserError, match="is no device"):
        run(replace(options, device="gpu"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(replace(options, out_dir=tmp_path / "file" / "out"))


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(options, monkeypatch, capsys):
    """In the middle of a run training goes on, for room may be made; at its end the command fails."""
    real = os.fsync

    def full_for_step_4(file):
        if "step_00000004" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr("minimind.files.os.fsync", full_for_step_4)
    given = replace(options, save_interval=2, max_steps=6)
    trainer = run(given)
    said = r"could not write .*step_00000004.*No space left on device; .* MB are free there.*training goes on"
    assert re.search(said, capsys.readouterr().out)
    folder = trainer.run_dir / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002", "step_00000006"]
    assert not list(options.out_dir.rglob("*.tmp"))

    with pytest.raises(UserError, match=r"could not write .*step_00000004"):
        run(replace(options, save_interval=2, max_steps=4))
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002"]
    left = options.out_dir / "pretrain_64.pth"  # far smaller than a checkpoint, so there may be room for it
    monkeypatch.undo()
    whole = run(replace(options, save_interval=2, max_steps=4, out_dir=options.out_dir / "whole"))
    ours, theirs = torch.load(left), torch.load(whole.weights_path)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def command(options, *more: str) -> list[str]:
    flags = [
        f"--{name}={getattr(options, name)}"
        for name in ("data_path", "out_dir", "batch_size", "dtype", "compile", "learning_rate", *SIZE)
    ]
    return [sys.executable, str(ROOT / "trainer" / "train_pretrain.py"), *flags, *more]


def test_two_processes_train_like_one(options, tmp_path):
    alone = run(replace(options, batch_size=8, accumulation_steps=1, out_dir=tmp_path / "alone"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = command(options, "--max_steps=7", "--batch_size=8", "--accumulation_steps=1")[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch + script, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (options.out_dir / "runs" / "pretrain_64" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    # Sums in another order, whose rounding seven steps multiply: 1.005e-5 on one processor, less on another.
    assert losses == pytest.approx(metrics(alone), rel=1e-4)
