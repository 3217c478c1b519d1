"""`minimind doctor`: each finding, provoked; exit codes; processes that do not fit together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minimind.cli import main
from minimind.doctor import machine, processes
from minimind.doctor.findings import OK, PROBLEM, WARNING, Finding
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

GOOD = [{"text": f"第{i}天，太阳从东边升起来了。"} for i in range(2000)]


def chat(question: str, answer: str, key: str = "conversations") -> dict:
    return {key: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def doctor(tmp_path, capsys):
    """Run it on records (or raw lines); returns the exit code and what was printed."""

    def run(records: list, *flags: str) -> tuple[int, str]:
        path = tmp_path / "data.jsonl"
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        code = main(["doctor", str(path), *flags])
        return code, capsys.readouterr().out

    return run


# ---- Data ----


def test_good_data_is_fit(doctor):
    code, said = doctor(GOOD[:50])
    assert code == 0
    assert "50 good records of kind pretrain, told from its first record" in said
    assert said.count("OK ") == 5
    assert said.endswith("verdict: fit to train on\n")


def test_bad_records_are_grouped_by_reason(doctor):
    broken = [b'{"text": "a', b'{"text": ""}', b'{"text": "abc', b'{"text": 3}', b"{}", b"\xff\xfe"]
    code, said = doctor([GOOD[0], *broken, *GOOD[1:9]])
    assert code == 1
    assert "PROBLEM  2 bad: line: broken JSON" in said
    assert "(lines 2, 4); mend, or --on_bad_record skip" in said
    assert "1 bad: text: empty (line 3)" in said
    assert "1 bad: text: missing (line 6)" in said
    assert "is not UTF-8" in said
    assert "verdict: 5 to mend first" in said


def test_only_the_first_lines_are_named(doctor):
    _, said = doctor([GOOD[0]] + [b"{}"] * 7)
    assert "7 bad: text: missing (lines 2, 3, 4, 5, 6, …)" in said


def test_copies_are_found_by_content(doctor):
    again = b'{"source": "elsewhere", "text": ' + json.dumps(GOOD[3]["text"]).encode() + b"}"
    code, said = doctor([*GOOD[:20], b"", again])
    assert code == 0
    assert "WARNING  1 (4.8%) copies of an earlier record" in said
    assert "(line 22)" in said
    assert "fit to train on, with 1 to look at" in said
    assert doctor(GOOD[:5] * 2)[0] == 1


@pytest.mark.parametrize(
    "garbage",
    ["caf\u00c3\u00a9", "锟斤拷锟斤拷", "\ufffd\ufffd", "a\x00b", "中文".encode().decode("latin-1")],
)
def test_garbled_records(doctor, garbage):
    code, said = doctor([*GOOD[:20], {"text": f"从前有座山，{garbage}"}])
    assert code == 1
    assert "PROBLEM  1 (4.8%) garbled" in said
    assert "in line 21)" in said


def test_a_few_garbled_records_and_good_letters_are_tolerated(doctor):
    letters = [{"text": text} for text in ("São João é, à…”", "MANHÃ “Groß…” Ångström", "a\tb\r\nc naïve")]
    assert "no garbled records" in doctor(GOOD[:20] + letters)[1]
    code, said = doctor([*GOOD, {"text": "山\ufffd"}, {"text": "山" * 2000 + "\ufffd"}])
    assert code == 0
    assert "WARNING  1 (0.0%) garbled" in said


def test_nearly_empty_records(doctor):
    code, said = doctor([*GOOD[:20], {"text": " 好。 "}, {"text": "好的，好"}, {"text": "好的，很好"}])
    assert code == 1
    assert "2 (8.7%) with less than 5 characters; leave them out (' 好。 ' in lines 21, 22)" in said


def test_over_long_records_by_kind(doctor):
    """Exactly at the border, for each kind, and as training will see them."""
    text = {"text": "春" * 300}
    code, said = doctor([*GOOD[:20], text], "--max_seq_len", "64")
    assert code == 0
    assert "WARNING  1 (4.8%) longer than --max_seq_len 64; they are split" in said
    assert "no over-long" in doctor([*GOOD[:20], text])[1]  # 512 as in pretraining

    records = [chat(f"{i}加{i}等于几？", f"{i + i}") for i in range(20)]
    _, mask = Tokenizer.load().encode_chat(records[-1]["conversations"])
    needed = max(i for i, target in enumerate(mask) if target)
    assert "no over-long" in doctor(records, "--max_seq_len", str(needed))[1]
    code, said = doctor(records, "--max_seq_len", str(needed - 1))
    assert code == 1
    assert "they lose their last answers" in said

    pairs = [chat(f"问{i}", "好" * 20, "chosen") | chat(f"问{i}", "坏", "rejected") for i in range(3)]
    code, said = doctor(pairs, "--max_seq_len", "16")
    assert code == 1
    assert "kind preference" in said
    assert "3 (100.0%) longer than --max_seq_len 16; they are left out" in said


def test_the_kind_is_told_or_given(doctor):
    thought = chat("1+1=?", "<think>\n一加一\n</think>\n<answer>\n2\n</answer>")
    assert "kind reasoning" in doctor([thought, thought])[1]
    assert "kind conversation" in doctor([chat("你好吗？", "我很好")])[1]
    with pytest.raises(UserError, match=r"no field text, conversations or chosen.*--kind"):
        doctor([{"content": "x"}])
    code, said = doctor([{"content": "x"}], "--kind", "pretrain")
    assert code == 1
    assert "no usable record; is --kind pretrain right?" in said


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        main(["doctor", str(tmp_path / "none.jsonl")])


# ---- Machine ----


def test_this_machine(tmp_path, capsys):
    assert main(["doctor", "--out_dir", str(tmp_path / "deep" / "out")]) == 0
    said = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in said
    assert "GB free in" in said
    assert not (tmp_path / "deep").exists()


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
