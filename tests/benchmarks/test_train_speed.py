"""The training benchmark on a few records: every rival has a rate, and useful tokens mean one thing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.own_steps import OwnSteps
from benchmarks.peers.recipe import padded_fp32
from benchmarks.step_profile import ATTENTION, DATA, MLP_PRODUCTS, OPTIMIZER, PARTS, VOCABULARY
from benchmarks.train_speed import RECIPE, Setting, main, own_steps
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

LITGPT = os.environ.get("LITGPT_PYTHON")  # a Python where litgpt is, see benchmarks/litgpt.txt
COMMAND = "--presets tiny --max_seq_len 32 --batch_size 2 --rounds 1 --compile 0".split()


def write_data(folder: Path, count: int = 40) -> Path:
    texts = [{"text": f"第{number}天，天气很好，我们去公园散步。"} for number in range(count)]
    chats = [
        [{"role": "user", "content": f"{number}加一？"}, {"role": "assistant", "content": f"{number + 1}。"}]
        for number in range(count)
    ]
    write(folder / "pretrain_hq.jsonl", texts)
    write(folder / "sft_mini_512.jsonl", [{"conversations": chat} for chat in chats])
    return folder


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_every_rival_has_a_rate_and_the_step_its_parts(tmp_path):
    write_data(tmp_path)
    path = tmp_path / "results.json"
    assert main([*COMMAND, "--profile", "1", "--data_dir", str(tmp_path), "--json", str(path)]) == 0
    results = json.loads(path.read_text(encoding="utf-8"))
    told = [*COMMAND[:2], "--data_dir", "DATA_DIR", *COMMAND[2:], "--profile", "1"]
    assert results["command"] == f"python -m benchmarks.train_speed {' '.join(told)}"
    assert [s["data"] for s in results["settings"]] == ["pretrain_hq", "sft_mini_512"]
    assert [s["litgpt"] for s in results["settings"]] == ["not measured: no --litgpt_python", None]
    for setting in results["settings"]:
        assert setting["tokens_per_s"].keys() == {RECIPE, "minimind"}
        assert all(len(rates) == 1 and rates[0] > 0 for rates in setting["tokens_per_s"].values())
        assert (setting["preset"], setting["rows"], setting["passes"]) == ("tiny", 2, 1)
        assert 0 <= setting["waiting_for_data"] < 1
        assert 0 < setting["of_matmul_rate"] < 1
        assert setting["matmul_bf16_flops"] > 0
    seconds = results["profile"]["seconds"]
    assert list(seconds) == list(PARTS)
    assert min(seconds[part] for part in (ATTENTION, MLP_PRODUCTS, VOCABULARY, OPTIMIZER)) > 0
    assert seconds[DATA] >= 0


def setting(path: Path, length: int) -> Setting:
    return Setting("tiny", path.stem, path, length, rows=1, passes=1, compile="0")


def steps_of_one_record(path: Path, length: int, folder: Path) -> tuple[OwnSteps, int]:
    """Our steps, and what one step of the recipe counts, on the same file."""
    one = setting(path, length)
    recipe = padded_fp32(one.preset, path, one.kind, length, one.rows, one.passes)
    return own_steps(one, folder, "0"), recipe()


def test_a_text_counts_alike(tmp_path):
    path, text = tmp_path / "pretrain_hq.jsonl", "今天天气很好。"
    write(path, [{"text": text}])
    ours, recipe = steps_of_one_record(path, 64, tmp_path)
    expected = len(Tokenizer.load().encode(text)) + 1  # and the two around it, less the last
    assert (recipe, ours.step()) == (expected, expected)


def test_a_conversation_counts_alike_but_for_its_last_line_break(tmp_path):
    path = tmp_path / "sft_mini_512.jsonl"
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    write(path, [{"conversations": chat}])
    ours, recipe = steps_of_one_record(path, 64, tmp_path)
    expected = len(Tokenizer.load().encode_chat(chat)[0]) - 1
    assert (recipe, ours.step()) == (expected, expected - 1)


def test_a_python_without_litgpt_is_refused(tmp_path):
    write_data(tmp_path)
    with pytest.raises(UserError, match=r"litgpt\.txt"):
        main([*COMMAND, "--data_dir", str(tmp_path), "--litgpt_python", str(tmp_path / "python")])


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no pretrain_hq"):
        main([*COMMAND, "--data_dir", str(tmp_path)])


def test_a_broken_record_is_told_as_a_sentence(tmp_path):
    write_data(tmp_path)
    (tmp_path / "pretrain_hq.jsonl").write_text('{"text": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"pretrain_hq\.jsonl:1"):
        main([*COMMAND, "--data_dir", str(tmp_path)])


@pytest.mark.skipif(not LITGPT, reason="LITGPT_PYTHON names no Python where litgpt is")
def test_litgpt_trains_the_same_shape(tmp_path):
    from benchmarks.peers.litgpt_peer import litgpt_steps
    from minimind.config import PRESETS
    from minimind.model import MiniMind

    write_data(tmp_path)
    path = tmp_path / "pretrain_hq.jsonl"
    step = litgpt_steps(Path(LITGPT), "tiny", path, 32, 2, 2, False, tmp_path)
    assert [step(), step()] == [2 * 2 * 32, 2 * 2 * 32]
    log = (tmp_path / "litgpt.log").read_text(encoding="utf-8")
    assert f"Total parameters: {MiniMind(PRESETS['tiny']).num_parameters:,}" in log
