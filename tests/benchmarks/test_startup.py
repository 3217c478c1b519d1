"""The benchmark of start-up: it knows every command, and its parts make up the whole."""

from __future__ import annotations

import json

import pytest

from benchmarks import startup
from benchmarks.startup import commands, main
from minimind.errors import UserError
from minimind.paths import ROOT


def test_every_command_is_asked():
    found = commands()
    scripts = [command[0] for command in found if command[0] != "-m"]
    assert scripts == [
        "eval_model.py",
        *(f"trainer/{path.name}" for path in sorted((ROOT / "trainer").iterdir())),
    ]
    assert ["-m", "minimind"] in found
    assert ["-m", "minimind", "doctor"] in found


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        startup, "commands", lambda: [["eval_model.py"], ["-m", "minimind", "train", "pretrain"]]
    )
    data, path = tmp_path / "data.jsonl", tmp_path / "startup.json"
    lines = (json.dumps({"text": f"{number} 床前明月光" * 20}, ensure_ascii=False) for number in range(200))
    data.write_text("\n".join(lines), encoding="utf-8")
    small = ["--preset", "tiny", "--max_seq_len", "64", "--batch_size", "2", "--rounds", "1"]
    assert main([*small, "--data_path", str(data), "--json", str(path)]) == 0

    results = json.loads(path.read_text(encoding="utf-8"))
    assert [*results["help_s"]] == ["python eval_model.py", "python -m minimind train pretrain"]
    assert all(seconds > 0 for seconds in results["help_s"].values())
    parts = results["first_step_parts_s"]
    assert min(parts.values()) >= 0
    # The data comes from the cache, and PyTorch takes longer than anything of ours.
    assert max(parts, key=parts.get) in ("import of PyTorch", "other imports", "first step", "optimizer")
    assert len(parts) == 10
    assert results["first_step_s"][0] > parts["import of PyTorch"] / 3


def test_a_training_without_a_step_is_said(tmp_path):
    with pytest.raises(UserError, match="ended without a step"):
        startup.first_step_seconds([f"--data_path={tmp_path / 'none.jsonl'}", f"--out_dir={tmp_path}"])
