"""`minimind doctor`: each finding about a machine, provoked; processes that do not fit together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minimind.cli import main
from minimind.doctor import machine, processes
from minimind.findings import OK, PROBLEM, WARNING, Finding

# ---- Machine ----


def test_this_machine(tmp_path, capsys):
    assert main(["doctor", "--out_dir", str(tmp_path / "deep" / "out")]) == 0
    said = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in said
    assert "GB free in" in said
    assert not (tmp_path / "deep").exists()


def test_data_is_examined_elsewhere(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "data.jsonl")])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_disk_that_is_full_or_closed(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1e9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    assert machine.disk(tmp_path).level == WARNING
    usage.free = 1e8
    assert machine.disk(tmp_path).level == PROBLEM
    (tmp_path / "file").touch()
    assert machine.disk(tmp_path / "file" / "out").level == PROBLEM


def test_little_memory_and_no_compiler(monkeypatch):
    monkeypatch.setattr(machine, "machine_memory", lambda: 2e9)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine.memory().level == machine.compiler().level == WARNING


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
def test_a_driver_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for CPU; install one for CUDA" in machine.torch_and_gpus()[-1].text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "does not serve CUDA 13.0" in machine.torch_and_gpus()[-1].text


# ---- Processes ----


def facts(rank: int, **different) -> dict:
    same = {"host": "a", "gpus": 2, "Python": "3.11", "PyTorch": "2.13", "CUDA": "13.0", "NCCL": "2.28"}
    return {"rank": rank, "gpu": f"GPU-{rank}", "MiniMind": "abc", **same, **different}


def test_processes_that_are_alike():
    both = [facts(0), facts(1)]
    assert [f.level for f in processes.agreement(both) + processes.own_gpus(both)] == [OK, OK]


@pytest.mark.parametrize("name", ["Python", "PyTorch", "CUDA", "NCCL", "MiniMind"])
def test_versions_that_differ(name):
    (found,) = processes.agreement([facts(0), facts(1, host="b", **{name: "1.0"}), facts(2)])
    assert found.level == PROBLEM
    assert found.text.startswith(f"{name} differs")
    assert "1.0: process 1 on b" in found.text


def test_gpus_that_are_shared_or_missing():
    (shared,) = processes.own_gpus([facts(0), facts(1, gpu="GPU-0")])
    assert (shared.level, shared.text) == (
        PROBLEM,
        "process 1 on a has the GPU of process 0; mend CUDA_VISIBLE_DEVICES",
    )
    (missing,) = processes.own_gpus([facts(0), facts(1, gpu=None, gpus=1)])
    assert "process 1 on a has no GPU of its own (1 seen there)" in missing.text
    assert processes.own_gpus([facts(0, gpu=None, gpus=0)])[0].level == OK


def test_other_machines_say_only_what_is_wrong(monkeypatch):
    monkeypatch.setattr(processes, "collective", lambda backend: Finding(OK, backend))
    here, there = Finding(OK, "here"), [Finding(OK, "fine"), Finding(WARNING, "little memory")]
    brought = [{"facts": facts(0), "findings": [here]}, {"facts": facts(1, host="b"), "findings": there}]
    said = [finding.text for finding in processes.together(brought)]
    assert said[:2] == ["here", "b: little memory"]
    assert said[-2:] == ["gloo", "nccl"]


def test_the_meeting_place(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        assert f"127.0.0.1:{port} is taken" in processes.meeting_place().text
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        assert processes.meeting_place().level == OK
    assert "cannot be reached" in processes.meeting_place().text
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert processes.meeting_place().level == OK
    monkeypatch.setenv("MASTER_ADDR", "no.such.machine.invalid")
    assert "is no machine" in processes.meeting_place().text


def test_two_processes_find_together(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "minimind", "doctor", "--out_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes with the same versions") == 1
    assert "a sum over 2 processes works (gloo)" in done.stdout
    assert "the processes meet at" in done.stdout
