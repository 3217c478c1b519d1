"""Learning curves of both on a little text; when one reaches what the other ends with."""

from __future__ import annotations

import json

import pytest

from benchmarks.comparisons import Point, seconds_to
from benchmarks.time_to_quality import main


def test_both_learn_for_the_time_they_are_given(tmp_path):
    lines = [json.dumps({"text": "天地玄黄，宇宙洪荒。" * (1 + number % 7)}) for number in range(300)]
    data, held_out, found = tmp_path / "texts.jsonl", tmp_path / "held_out.jsonl", tmp_path / "found.json"
    data.write_text("\n".join(lines), encoding="utf-8")
    held_out.write_text("\n".join(lines[:20]), encoding="utf-8")
    flags = "--minutes 0.15 --part 0.5 --evaluations 2 --max_seq_len 64 --rows 2 --recipe_rows 2 --compile 0"
    assert (
        main(
            [
                "--presets=tiny",
                *flags.split(),
                f"--data_path={data}",
                f"--eval_path={held_out}",
                f"--json={found}",
            ]
        )
        == 0
    )

    results = json.loads(found.read_text(encoding="utf-8"))
    assert flags.replace("--rows 2 --recipe_rows 2", "--recipe_rows 2 --rows 2") in results["command"]
    recipe, ours = results["curves"]["tiny"].values()
    assert [len(recipe), len(ours)] == [2, 2]
    assert 0 <= recipe[0]["tokens"] < recipe[1]["tokens"]
    assert recipe[1]["bits_per_byte"] < recipe[0]["bits_per_byte"]
    assert recipe[1]["seconds"] < 18
    # On a busy machine neither may have done a step at the first look. Our number of steps is set before.
    assert 0 <= ours[0]["tokens"] <= ours[1]["tokens"] > 0
    # 0.03 on an idle machine, 1.04 on one that had time for four steps; random weights have 4.7.
    assert ours[1]["bits_per_byte"] < 2.5
    assert ours[1]["seconds"] < 9
    assert "<dc:description>tiny, original's recipe, bits per byte, held out: " in found.with_suffix(
        ".svg"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(("goal", "seconds"), [(5.0, 10), (4.0, 10), (3.5, 15), (3.0, 20), (2.0, None)])
def test_when_a_curve_gets_there(goal, seconds):
    curve = [Point(10, 1, 4.0), Point(20, 2, 3.0), Point(30, 3, 3.2)]
    assert seconds_to(curve, goal) == seconds
