"""Two machines train like one. The machines are network namespaces, each with its own end of a cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minimind.paths import ROOT

from .conftest import SIZE, metrics, run


class Machines:
    """Two network namespaces that reach each other over a pair of virtual devices, and nothing else."""

    def __init__(self) -> None:
        self.names = [f"minimind{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.231.7.1", "10.231.7.2"]

    def connect(self) -> None:
        a, b = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in self.names:  # the devices go with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, machine: int, script: list[str]) -> subprocess.Popen:
        """One process of two on a machine, as `torchrun` is called there by hand."""
        launcher = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_id=7",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={self.addresses[0]}:29400",
            f"--rdzv_conf=is_host={int(machine == 0)}",
            f"--local_addr={self.addresses[machine]}",
        ]
        inside = ["ip", "netns", "exec", self.names[machine]]
        return subprocess.Popen(
            [*inside, sys.executable, "-m", "torch.distributed.run", *launcher, *script],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines():
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` to make network namespaces with")
    made = Machines()
    try:
        made.connect()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    else:
        yield made
    finally:
        made.remove()


@pytest.fixture
def train(machines, options):
    """Train on both machines; returns both exit codes and what they said on stderr."""
    started = []

    def start(out_dirs: list[Path], data: list[Path], *more: str) -> list[tuple[int, str]]:
        names = ("dtype", "compile", "learning_rate", "max_steps", *SIZE)
        flags = [f"--{name}={getattr(options, name)}" for name in names]
        for machine in range(2):
            own = [f"--out_dir={out_dirs[machine]}", f"--data_path={data[machine]}", "--batch_size=8"]
            script = [str(ROOT / "trainer" / "train_pretrain.py"), *flags, *own, "--accumulation_steps=1"]
            started.append(machines.start(machine, [*script, *more]))
        said = [process.communicate(timeout=150)[1] for process in started[-2:]]
        return [(process.returncode, text) for process, text in zip(started[-2:], said, strict=True)]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def losses(out_dir: Path) -> list[float]:
    lines = (out_dir / "runs" / "pretrain_64" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_two_machines_train_like_one_and_go_on_together(train, options, tmp_path):
    alone = run(replace(options, batch_size=8, accumulation_steps=1, out_dir=tmp_path / "alone"))
    out, data = options.out_dir, options.data_path
    for code, said in train([out, out], [data, data]):
        assert code == 0, said[-2000:]
    assert losses(out) == pytest.approx(metrics(alone), rel=1e-4)  # rounding, as in test_loop.py

    (out / "pretrain_64.pth").unlink()
    for code, said in train([out, out], [data, data], "--from_resume=1"):
        assert code == 0, said[-2000:]
    assert (out / "pretrain_64.pth").is_file()


def test_machines_without_a_shared_disk_or_with_other_data_are_told_so(train, options, tmp_path):
    out, data = options.out_dir, options.data_path
    results = train([out, tmp_path / "other"], [data, data])
    assert all(code != 0 for code, _ in results)
    said = "".join(text for _, text in results)
    assert said.count("is not the same folder for all processes") == 2  # each names its own folder
    assert f'File "{ROOT / "trainer"}' not in said  # in no stack trace; torchrun may log one of its own

    changed = tmp_path / "changed.jsonl"
    changed.write_text(data.read_text(encoding="utf-8") + '{"text": "more"}\n', encoding="utf-8")
    results = train([out, out], [data, changed])
    assert all(code != 0 for code, _ in results)
    assert "error: process 1 on" in results[1][1]
    assert "data (its content) in process 0 is" in results[1][1]
