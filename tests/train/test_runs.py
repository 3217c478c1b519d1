"""The folder of a run: it is one run's alone, and a new one costs nothing of the one before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from minimind.errors import UserError
from minimind.runs import read_run, read_settings
from minimind.train import loop
from minimind.train.checkpoint import list_checkpoints

from .conftest import PRETRAIN, metrics, run


def test_a_new_run_keeps_the_old_checkpoints_until_it_has_its_own(options, monkeypatch, capsys):
    first = run(replace(options, save_interval=2))
    said = metrics(first), read_run(first.weights_path)
    kept = list_checkpoints(first.run_dir / "checkpoints")
    assert [p.name for p in kept] == ["step_00000006", "step_00000007"]
    monkeypatch.setattr(loop, "optimizer_step", lambda *_: pytest.fail("reached"))
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception):
            run(replace(options, seed=2))
    assert list_checkpoints(first.run_dir / "checkpoints") == kept
    assert "--from_resume 1 would go on" in capsys.readouterr().out
    assert metrics(first) == []
    assert read_run(first.weights_path) == said[1]  # of the run that made them
    monkeypatch.undo()
    run(replace(options, save_interval=2, from_resume=True))
    assert (metrics(first), read_run(first.weights_path)["run_id"]) == (said[0], first.run_id)

    run(replace(options, max_steps=3))
    assert [p.name for p in list_checkpoints(first.run_dir / "checkpoints")] == ["step_00000003"]
    previous = first.run_dir / "previous"
    assert [p.name for p in list_checkpoints(previous / "checkpoints")] == [p.name for p in kept]
    assert (previous / "pretrain_64.pth").is_file()
    assert read_settings(previous)["run_id"] == first.run_id
    assert (previous / "metrics.jsonl").read_text().count('"loss"') == len(said[0])
    folders = sorted(path.name for path in first.run_dir.iterdir() if path.is_dir())
    assert folders == ["checkpoints", "previous"]


def test_a_run_killed_in_its_first_save_leaves_the_one_it_has_set_aside(options):
    whole = run(options)
    kept = whole.weights_path.read_bytes()
    killed = run(replace(options, max_steps=3)).run_dir
    unfinished = killed / "checkpoints" / "step_00000003"
    for path in (unfinished.with_suffix(".sha256"), whole.weights_path, killed / "report.html"):
        path.unlink()
    run(replace(options, max_steps=2))
    assert (killed / "previous" / "pretrain_64.pth").read_bytes() == kept
    assert not unfinished.exists()


@pytest.mark.parametrize("unmoved", ["pretrain_64.pth", "report.html", "run.json"])
def test_a_run_killed_while_it_sets_another_aside_costs_nothing_of_it(options, monkeypatch, unmoved):
    whole = run(options)
    kept = whole.weights_path.read_bytes()
    move = Path.replace

    def killed_before(path, target):
        if Path(target).parent.name == ".previous.tmp" and path.name == unmoved:
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", killed_before)
    with pytest.raises(KeyboardInterrupt):
        run(replace(options, max_steps=3))
    assert list_checkpoints(whole.run_dir / "checkpoints") == []  # they have moved
    monkeypatch.undo()
    run(replace(options, max_steps=2))
    previous = whole.run_dir / "previous"
    assert [p.name for p in list_checkpoints(previous / "checkpoints")] == ["step_00000007"]
    assert (previous / "pretrain_64.pth").read_bytes() == kept
    assert read_settings(previous)["run_id"] == whole.run_id
    run(replace(options, max_steps=1))  # and the next one finds nothing unfinished
    assert [p.name for p in list_checkpoints(previous / "checkpoints")] == ["step_00000002"]
    assert not list(whole.run_dir.glob(".*.tmp"))


def test_a_run_stopped_before_its_first_step_changes_nothing(options, monkeypatch):
    first = run(options)
    files = (first.weights_path, first.run_dir / "run.json", first.run_dir / "metrics.jsonl")
    kept = [path.read_bytes() for path in files]

    def interrupted(self, *_):
        raise loop.Interrupted

    monkeypatch.setattr(loop, "optimizer_step", interrupted)
    assert run(options).exit_code > 128
    assert [path.read_bytes() for path in files] == kept
    assert [p.name for p in list_checkpoints(first.run_dir / "checkpoints")] == ["step_00000007"]


def test_two_runs_do_not_share_a_folder(options):
    trainer = run(replace(options, max_steps=1))
    with loop.alone_in(trainer.run_dir), pytest.raises(UserError, match="another run is at work in"):
        loop.train(PRETRAIN, options)
    assert loop.train(PRETRAIN, options) == 0
