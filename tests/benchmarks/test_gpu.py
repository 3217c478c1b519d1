"""The GPU benchmark, dry on a CPU: all its rows come out, and its checks and its time box do their work."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.data import FILES, write_data
from benchmarks.gpu.jobs import OwnProcess, in_own_process, wait_for_turn
from benchmarks.gpu.report import data_sheet
from benchmarks.gpu.speed import Setting
from minimind import model as model_file
from minimind.config import ModelConfig


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    arguments = ["--device", "cpu", "--dry_run", "1", "--seconds", "0.05", "--json", str(path)]
    assert main([*arguments, "--data_dir", str(path.parent / "none")]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_row_for_every_preset_and_stage(results):
    rows = {(row["stage"], row["preset"]) for row in results["speed"]}
    assert rows == {("pretrain", p) for p in ("tiny", "small", "base", "moe", "wide")} | {
        (stage, "small") for stage in ("sft", "lora", "dpo", "reason", "distill")
    }
    for row in results["speed"]:
        assert "error" not in row, row
        assert min(row["tokens_per_s"], row["peak_gb"], row["steps"]) > 0
        assert row["mfu_measured"] == pytest.approx(
            row["flops_per_token"] * row["tokens_per_s"] / results["peak_flops"]["measured"]
        )


def test_what_an_epoch_takes(results):
    small = results["speed"][0]
    assert (small["stage"], small["preset"]) == ("pretrain", "small")
    assert results["epoch_hours"]["extrapolated"] == pytest.approx(330e6 / small["tokens_per_s"] / 3600)
    run = results["stretch"]
    assert 0 < run["rest_s"] == pytest.approx(run["run_s"] - run["steps"] * run["step_s"])
    assert results["epoch_hours"]["from_the_stretch"] * 3600 == pytest.approx(
        run["rest_s"] + 330e6 * run["step_s"] * run["steps"] / run["tokens"]
    )


def test_every_check_is_made_and_passes(results):
    assert [check for check in results["checks"] if not check["passed"]] == []
    for kind in ("dense", "moe"):
        names = " ".join(check["check"] for check in results["checks"] if check["model"] == kind)
        for part in (
            "gradients, fp32",
            "bf16 against fp32",
            "seen by others",
            "compiled",
            "training",
            "greedy",
            "endings",
        ):
            assert part in names


def test_which_machine_it_was(results):
    assert results["command"].startswith("python -m benchmarks.gpu --data_dir DATA_DIR --device cpu")
    assert results["card"]
    assert results["machine"]["PyTorch"] == torch.__version__
    assert results["dry_run"] is True
    assert set(results["data"].values()) == {"generated"}


@pytest.fixture
def setting(tmp_path) -> Setting:
    write_data(tmp_path, Path("/nowhere"), 50)
    return Setting("cpu", tmp_path, 0.1, True)


def test_documents_that_see_each_other_are_noticed(setting, monkeypatch):
    model = checks.random_model(ModelConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    arguments = (model, checks.packed_batch(setting), torch.device("cpu"))
    assert all(check["passed"] for check in checks.run("dense", checks.apart, *arguments))
    monkeypatch.setattr(model_file, "attention_mask", lambda *_: None)
    failed = {c["check"] for c in checks.run("dense", checks.apart, *arguments) if not c["passed"]}
    assert failed == {f"a changed document, seen by others, {dtype}" for dtype in ("float32", "bfloat16")}


def test_wrong_gradients_are_noticed(setting, monkeypatch):
    model = checks.random_model(ModelConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    batch, real, calls = checks.packed_batch(setting), checks.loss_and_gradients, []

    def off(*arguments):
        loss, gradients = real(*arguments)
        calls.append(loss)
        return loss, [g * (1.01 if len(calls) == 1 else 1) for g in gradients]

    monkeypatch.setattr(checks, "loss_and_gradients", off)
    passed = [c["passed"] for c in checks.run("dense", checks.against_cpu, model, batch, torch.device("cpu"))]
    assert passed == [True, False]


def test_real_files_are_taken_where_they_are(tmp_path):
    source, target = tmp_path / "real", tmp_path / "data"
    source.mkdir(), target.mkdir()
    (source / "dpo.jsonl").write_text("one\ntwo\nthree\n", encoding="utf-8")
    origins = write_data(target, source, 2)
    assert (target / "dpo.jsonl").read_text(encoding="utf-8") == "one\ntwo\n"
    assert [name for name, origin in origins.items() if origin != "generated"] == ["dpo"]
    assert {path.stem for path in target.iterdir()} == set(FILES.values())


def test_a_fault_a_hang_and_a_death_are_rows():
    assert in_own_process(60, pow, 2, 3) == 8
    assert "ZeroDivisionError" in in_own_process(60, divmod, 1, 0)["error"]
    assert "more than 1 s" in in_own_process(1, time.sleep, 60)["error"]
    assert "code 3" in in_own_process(60, os._exit, 3)["error"]


def note_turn(path: Path) -> str:
    path.with_suffix(".ready").touch()
    wait_for_turn()
    path.with_suffix(".done").touch()
    return path.name


def test_processes_get_ready_together_and_go_on_in_turn(tmp_path):
    names = [tmp_path / name for name in "ab"]
    processes = [OwnProcess(note_turn, name) for name in names]
    for process in processes:
        process.ready(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ready", "b.ready"]
    assert processes[1].result(60) == "b"
    assert not (tmp_path / "a.done").exists()
    assert processes[0].result(60) == "a"


def test_a_process_that_dies_before_its_turn_is_a_row():
    process = OwnProcess(os._exit, 3)
    process.ready(60)
    assert "code 3" in process.result(60)["error"]


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("AMD EPYC", None),
    ],
)
def test_the_data_sheet_of_a_card(card, tflops):
    assert data_sheet(card) == (tflops and tflops * 1e12)
