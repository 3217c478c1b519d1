"""Pages and figure show what the results say: nothing older, and nothing typed by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import readme, side_by_side
from benchmarks.comparisons import OURS, RECIPE, Point, generation, preparation, races, stages, training
from benchmarks.pictures import PICTURES
from benchmarks.readme import BEGIN, END, PART, RESULTS, main, refresh, rendered
from benchmarks.startup import BenchmarkOptions as StartupOptions
from benchmarks.tables import BLOCKS
from benchmarks.train_speed import BenchmarkOptions as TrainOptions
from minimind.errors import UserError
from minimind.flags import parse_flags
from minimind.paths import ROOT

MEND = "run python -m benchmarks.readme"
READMES = ("README.md", "README_en.md")
RESULTS_OF = {"prepare_speed": ("prepare_speed", "prepare_memory")}  # of a benchmark with more than one


@pytest.fixture
def copy(tmp_path):
    """The pages with results, and the results, to be changed."""
    for name in (*READMES, "docs/zh/costs.md", "docs/en/costs.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "benchmarks/results")
    return tmp_path


@pytest.fixture
def undrawn(copy, monkeypatch):
    """Without the seconds that the figures take."""
    monkeypatch.setattr(readme, "draw", lambda _: None)
    return copy


def change(root: Path, name: str, change) -> None:
    path = root / f"benchmarks/results/{name}.json"
    result = json.loads(path.read_bytes())
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")


def test_pages_show_what_the_results_say():
    for _, text, should_be in rendered():
        assert text == should_be, MEND


def test_figures_show_what_the_results_say(copy):
    results = copy / "benchmarks/results"
    for name in PICTURES:
        (results / name).unlink()
    readme.draw(results)
    for name in PICTURES:
        assert re.search(r": \d", described(results / name))
        assert described(results / name) == described(RESULTS / name), MEND


def described(figure: Path) -> str:
    return re.search(r"<dc:description>(.*)</dc:description>", figure.read_text(encoding="utf-8"))[1]


@pytest.mark.parametrize("name", READMES)
def test_every_block_has_a_place_and_numbers_have_no_other(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert {found[1] for found in PART.finditer(text)} == BLOCKS.keys() - {"growth", "serving"}
    by_hand = PART.sub("", text).partition("benchmarks.readme")[2].replace("`1.00 ×`", "")
    assert not re.search(r"\d ?(×|%|倍)|\d ?(MB|GB)\b|\d,\d{3} (useful )?tokens?/s", by_hand)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_tells_its_command_and_machine(path):
    result = json.loads(path.read_bytes())
    module = re.match(r"python -m benchmarks\.(\w+)", result["command"])[1]
    assert path.stem in RESULTS_OF.get(module, (module,))
    assert {"processor", "cores", "system", "Python", "PyTorch"} <= result["machine"].keys()


def test_a_new_measurement_changes_pages_and_figure(copy):
    figure = copy / "benchmarks/results/speed.svg"
    figure.unlink()
    assert refresh(copy) == []
    before = figure.read_bytes()
    assert refresh(copy) == []
    assert figure.read_bytes() == before  # the same drawing from the same numbers

    def faster(result):
        small = result["settings"][0]
        small["tokens_per_s"] = {RECIPE: [100.0, 110.0, 90.0], OURS: [1234.0, 900.0, 1300.0]}
        result["settings"].append(small | {"preset": "base", "tokens_per_s": {RECIPE: [10], OURS: [55]}})

    change(copy, "train_speed", faster)
    changed = refresh(copy)
    assert {path.name for path in changed} == {*READMES, "costs.md"}
    for path in changed:
        text = path.read_text(encoding="utf-8")
        assert "| MiniMind | 1,234 (900–1,300) | 12.34 × |" in text
        assert "| `pretrain_hq`, `base` |" in text
        assert "| MiniMind | 55 (55–55) | 5.50 × |" in text
    assert "Training: pretrain_hq, small, MiniMind: median: 12.34, least: 9, most: 13." in described(figure)
    assert "Training: pretrain_hq, base, MiniMind: median: 5.5," in described(figure)


def test_what_was_not_measured_is_absent(undrawn):
    change(undrawn, "stage_peers", lambda result: result["stages"].pop("dpo"))
    (undrawn / "benchmarks/results/moe_speed.json").unlink()
    refresh(undrawn)
    text = (undrawn / "README.md").read_text(encoding="utf-8")
    parts = {found[1]: found[2] for found in PART.finditer(text)}
    assert "DPO" not in parts["stages"]
    assert "SFT" in parts["stages"]
    assert parts["mixture"] == "\n"


def test_a_gpu_that_fails_is_shown(undrawn):
    def fail(result):
        result["speed"][0] = {"stage": "pretrain", "preset": "small", "error": "out of memory"}
        result["matmul_bf16"] = {"error": "lost"}
        result["peak_flops"]["measured"] = result["epoch_hours"]["extrapolated"] = None
        result["speed"][1] |= {"tokens_per_s": 453_210, "mfu_data_sheet": 0.286, "peak_gb": 29.64}
        for row in result["speed"][1:]:
            row["mfu_measured"] = None

    change(undrawn, "gpu", fail)
    refresh(undrawn)
    text = (undrawn / "README_en.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- result: gpu -->") :]
    assert "| `small` |" not in table[: table.index("<!-- end -->")]
    assert "| `base` | 453,000 | ? | 29% | 29.6 GB |" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace(END, "", 1), "needs a line"),
        (lambda text: text.replace(f"{BEGIN}stages", f"{BEGIN}nothing"), "wants the result 'nothing'"),
    ],
)
def test_a_damaged_page_is_said_and_nothing_is_written(copy, damage, said):
    change(copy, "train_speed", lambda result: result["settings"].pop())
    page = copy / "README_en.md"
    page.write_text(damage(page.read_text(encoding="utf-8")), encoding="utf-8")
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=rf"README_en\.md.*{said}"):
        refresh(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}', '{"settings": [{"preset": "small"}]}'])
def test_a_damaged_result_is_named(undrawn, text):
    (undrawn / "benchmarks/results/train_speed.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"train_speed\.json"):
        refresh(undrawn)


def test_writing_a_result_writes_the_pages_too(undrawn, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", undrawn / "benchmarks/results")
    monkeypatch.setattr(readme, "refresh", lambda: refresh(undrawn))
    old = json.loads((RESULTS / "startup.json").read_bytes())
    options = parse_flags(StartupOptions, ["--rounds", "7"], None)
    for folder, seconds in ((undrawn / "benchmarks/results", "9.5 s"), (undrawn, "5.1 s")):
        side_by_side.write_results(folder / "startup.json", options, old | {"first_step_s": [9.5]})
        written = json.loads((folder / "startup.json").read_bytes())
        assert written["first_step_s"] == [9.5]
        text = (undrawn / "README_en.md").read_text(encoding="utf-8")
        assert ("done 9.5 s after the command" in text) == (seconds == "9.5 s")
        shutil.copy(RESULTS / "startup.json", undrawn / "benchmarks/results/startup.json")
        refresh(undrawn)


def test_a_command_is_told_without_the_paths_of_the_machine():
    typed = ["--presets", "small", "base", "--data_dir", "/secret", "--profile", "--json", "/secret/x.json"]
    told = side_by_side.command_line(parse_flags(TrainOptions, typed, None))
    assert told == (
        "python -m benchmarks.train_speed --presets small base --data_dir DATA_DIR --max_seq_len 512 "
        "--rounds 5 --compile auto --profile 1"
    )


def test_the_command_says_what_it_has_changed(capsys, monkeypatch):
    monkeypatch.setattr(readme, "refresh", lambda: [ROOT / "docs/zh/costs.md"])
    assert main([]) == 0
    assert capsys.readouterr().out == "docs/zh/costs.md has changed\n"


# ---- Medians and ratios ----


def test_times_are_those_of_the_peers_median():
    (one,) = training([{"preset": "tiny", "data": "d", "tokens_per_s": {RECIPE: [1, 2, 9], OURS: [4, 3, 8]}}])
    assert (one.work, one.times(OURS), one.times(RECIPE)) == ("d, tiny", (2, 1.5, 4), (1, 0.5, 4.5))


def test_the_peer_is_the_fastest_of_its_library_or_trl_as_it_comes():
    answers = {"minimind half × 1": [4.0], "transformers fp32 × 1": [1.0], "transformers bf16 × 1": [2.0]}
    assert generation(answers | {"transformers fp32 × 16": [5.0]})[1].times("minimind half").median == 2
    rates = {OURS: [6.0], "datasets.map, a": [2.0], "datasets.map, b": [3.0], "tokenizers alone": [9.0]}
    assert preparation(rates, 3.0).times(OURS).median == 2
    rivals = {name: {"tokens_per_s": [rate]} for name, rate in ((OURS, 6.0), ("TRL", 3.0), ("TRL, b", 1.0))}
    assert stages({"dpo": {"rivals": rivals}})["dpo"].times(OURS).median == 2


def test_a_race_that_is_not_won():
    curves = {"tiny": {RECIPE: [Point(10, 1, 3.0)], OURS: [Point(5, 1, 4.0)]}}
    ((preset, race),) = races(curves)
    assert (preset, race.goal, race.recipe_seconds, race.seconds, race.share) == ("tiny", 3.0, 10, None, None)
