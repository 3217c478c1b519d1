"""The growth benchmark: its fit is right, and a dry run measures all four axes."""

from __future__ import annotations

import json

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


def test_a_dry_run_measures_every_axis(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{number} {LINE * 3}"}, ensure_ascii=False) for number in range(200)]
    data.write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "growth.json"
    assert main(["--data_path", str(data), "--dry_run", "1", "--steps", "3", "--json", str(path)]) == 0

    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["command"] == "python -m benchmarks.growth --steps 3 --dry_run 1"
    assert (results["compile"], results["threads"]) == ("0", 1)
    lengths, models, files, processes = results["axes"]
    assert [point["x"] for point in lengths["points"]] == [64, 128]
    assert [point["x"] for point in processes["points"]] == [1, 2]
    assert models["points"][0]["x"] < models["points"][1]["x"] == pytest.approx(4.59, abs=0.01)
    # The last line that fits goes over by less than its own length.
    assert [point["x"] for point in files["points"]] == pytest.approx([0.05, 0.1], abs=3e-4)
    for axis in results["axes"]:
        for point in axis["points"]:
            assert point["seconds"] > 0
            assert point["peak_mb"] > (20 if axis is files else 200)
        for fit in axis["exponents"].values():
            assert fit["all"] == pytest.approx(fit["last_two"])  # with two points in all
    # One run serves two axes.
    assert (
        models["points"][1]["peak_mb"] == processes["points"][0]["peak_mb"] == lengths["points"][0]["peak_mb"]
    )
    assert path.with_suffix(".svg").read_text(encoding="utf-8").count('id="axes_') == 8  # two axes a panel


def test_steps_that_are_all_warm_up_are_refused():
    with pytest.raises(UserError, match="--steps is 2"):
        main(["--steps", "2"])


def test_a_training_that_fails_is_shown(tmp_path):
    with pytest.raises(UserError, match="there is no data at"):
        growth.train(["--preset=tiny"], 1, tmp_path)
