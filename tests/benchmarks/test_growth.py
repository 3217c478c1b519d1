"""The growth benchmark: its fit is right, and a dry run measures all four axes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import Axis, Point, exponent, main
from minimind.errors import UserError

LINE = "一二三四五，上山打老虎；老虎不在家，打到小松鼠。"


def test_an_exact_power_is_found():
    x = [128, 256, 512, 4096]
    for power in (0.0, 1.0, 2.0, -1.0):
        assert exponent(x, [7e-4 * value**power for value in x]) == pytest.approx(power, abs=1e-12)


def test_fixed_costs_hide_growth_from_all_points_but_the_last():
    points = [Point("", x, 1000 + x**2, 5) for x in (1, 10, 1000, 10000)]
    experts = Point("", 1e6, 1, 1, fitted=False)
    found = Axis("", "", "", [*points, experts]).exponents("seconds")
    assert found["last_two"] == pytest.approx(2, abs=0.01)
    assert found["all"] < 1.5
    assert Axis("", "", "", points).exponents("peak_mb")["all"] == pytest.approx(0, abs=1e-12)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{number} {LINE * 3}"}, ensure_ascii=False) for number in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_axis_is_measured_and_fitted(data, tmp_path, monkeypatch):
    runs = []

    def train(flags: list[str], processes: int, _: Path) -> dict[str, float]:
        runs.append((*flags, processes))
        given = dict(flag.removeprefix("--").split("=") for flag in flags)
        parameters = 1e6 if "num_hidden_layers" in given else 4e6
        seconds = int(given["max_seq_len"]) ** 2 * parameters * processes
        return {
            "parameters": parameters,
            "seconds_per_token": seconds,
            "seconds_per_step": seconds,
            "peak_mb": parameters,
        }

    monkeypatch.setattr(growth, "train", train)
    path = tmp_path / "growth.json"
    assert main(["--data_path", str(data), "--dry_run", "1", "--steps", "3", "--json", str(path)]) == 0
    assert len(set(runs)) == len(runs) == 4  # what two axes share is run once

    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["command"] == "python -m benchmarks.growth --data_path DATA_PATH --steps 3 --dry_run 1"
    lengths, models, files, processes = (axis["exponents"]["seconds"]["all"] for axis in results["axes"])
    assert (lengths, models, processes) == pytest.approx((2, 1, 1))
    assert results["axes"][1]["exponents"]["peak_mb"]["all"] == pytest.approx(1)
    sizes = results["axes"][2]["points"]
    assert [point["x"] for point in sizes] == pytest.approx([0.05, 0.1], abs=3e-4)
    assert files == pytest.approx(exponent(*zip(*[(p["x"], p["seconds"]) for p in sizes], strict=True)))
    assert all(point["seconds"] > 0 and point["peak_mb"] > 20 for point in sizes)
    assert path.with_suffix(".svg").read_text(encoding="utf-8").count('id="axes_') == 8  # two axes a panel


def test_two_processes_train(data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    growth.write_data(data, tmp_path, 100)
    flags = ["--preset=tiny", "--max_seq_len=64", "--batch_size=2", "--accumulation_steps=1", "--max_steps=3"]
    result = growth.train(flags, 2, tmp_path)
    assert result["parameters"] == pytest.approx(4.59e6, rel=0.01)
    assert 64 < result["seconds_per_step"] / result["seconds_per_token"] <= 128  # tokens of both in a step
    assert result["peak_mb"] > 200


def test_steps_that_are_all_warm_up_are_refused():
    with pytest.raises(UserError, match="--steps is 2"):
        main(["--steps", "2"])


def test_a_training_that_fails_is_shown(tmp_path):
    with pytest.raises(UserError, match="there is no data at"):
        growth.train(["--preset=tiny"], 1, tmp_path)
