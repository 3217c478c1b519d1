"""What a run leaves at its end: samples and a page, and the training is done whatever becomes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from minimind.chat import inference
from minimind.chat.questions import BEGINNINGS, GENERAL
from minimind.errors import UserError
from minimind.train import samples
from train.conftest import PRETRAIN, SFT, run
from train.test_loop import stop_after


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.run_dir / "samples.jsonl").read_text().splitlines()]


def test_samples_and_a_page(options, sft_options):
    first = run(options)
    second = run(sft_options, SFT)
    for trainer, asked in ((first, BEGINNINGS), (second, GENERAL)):
        assert [line["prompt"] for line in lines(trainer)] == asked[:4]
        assert all(line["run_id"] == trainer.run_id for line in lines(trainer))
        html = (trainer.run_dir / "report.html").read_text(encoding="utf-8")
        assert asked[0] in html
        assert html.count("<svg") == 5
        assert "not finished" not in html


def test_the_page_of_the_run_before_is_set_aside(options):
    before = run(options)
    page = (before.run_dir / "report.html").read_text(encoding="utf-8")
    again = run(replace(options, seed=1))
    assert (again.run_dir / "previous" / "report.html").read_text(encoding="utf-8") == page
    assert lines(again)[0]["run_id"] == again.run_id != before.run_id


def test_a_stopped_run_has_no_page_yet(options, monkeypatch):
    stop_after(3, monkeypatch)
    trainer = run(options)
    assert trainer.exit_code
    assert not (trainer.run_dir / "report.html").exists()


def test_a_full_disk_does_not_fail_the_training(options, monkeypatch, capsys):
    def full(path, text):
        raise UserError(f"could not write {path}: No space left on device")

    monkeypatch.setattr(samples, "write_text", full)
    trainer = run(options)
    assert trainer.exit_code == 0
    assert trainer.weights_path.exists()
    assert f"no report: could not write {trainer.run_dir / 'samples.jsonl'}" in capsys.readouterr().out


def test_too_little_memory_leaves_the_samples_out(options, monkeypatch):
    class TooLarge:
        def __init__(self, *_) -> None:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(inference, "InferenceModel", TooLarge)
    trainer = run(options)
    assert trainer.exit_code == 0
    assert lines(trainer) == []
    assert (trainer.run_dir / "report.html").exists()


def test_other_faults_are_not_hidden(options, monkeypatch):
    class Broken:
        def __init__(self, *_) -> None:
            raise RuntimeError("a bug")

    monkeypatch.setattr(inference, "InferenceModel", Broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(options, PRETRAIN)
