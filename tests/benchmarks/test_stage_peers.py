"""The stages beside TRL on a handful of records: every rival has a rate, and useful tokens mean one thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.stage_peers import DPO_EPOCHS, STAGES, main, result
from minimind.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "天空是什么颜色？"}, {"role": "assistant", "content": "天空是蓝色的。"}]
WORSE = [CHAT[0], {"role": "assistant", "content": "不知道。"}]
COPIES = 24  # of one record, so that what a step counts can be worked out by hand
ROWS = 2


def write(path: Path, record: dict) -> None:
    path.write_text((json.dumps(record) + "\n") * COPIES, encoding="utf-8")


def compare(stage: str, record: dict, folder: Path) -> dict[str, dict]:
    """The benchmark's results of one stage, rival by rival; what holds for all is checked here."""
    write(folder / f"{STAGES[stage][0]}.jsonl", record)
    path = folder / "results.json"
    sizes = ["--preset", "tiny", "--max_seq_len", "64", "--rows", str(ROWS)]
    flags = ["--rounds", "1", "--compile", "0", "--data_dir", str(folder), "--json", str(path)]
    assert main(["--stages", stage, *sizes, *flags]) == 0
    results = json.loads(path.read_text(encoding="utf-8"))
    assert f"--stages {stage} --preset tiny --data_dir DATA_DIR --max_seq_len 64" in results["command"]
    rivals = results["stages"][stage]["rivals"]
    for shown in rivals.values():
        assert len(shown["tokens_per_s"]) == len(shown["steps_alone_tokens_per_s"]) == 1
        assert min(shown["tokens_per_s"] + [shown["step_s"], shown["peak_gb"]]) > 0
    return rivals


def test_fine_tuning_counts_tokens_alike(tmp_path):
    """But for the line break after the last answer, which we leave out and TRL does not."""
    rivals = compare("sft", {"conversations": CHAT}, tmp_path)
    assert list(rivals) == ["minimind", "TRL", "TRL, packing"]
    tokens = len(Tokenizer.load().encode_chat(CHAT)[0])
    assert rivals["TRL"]["step_tokens"] == [ROWS * (tokens - 1)] * 2
    assert rivals["TRL, packing"]["step_tokens"] == [ROWS * (64 // tokens) * (tokens - 1)] * 2
    assert rivals["minimind"]["step_tokens"] == [ROWS * (64 // (tokens - 2)) * (tokens - 2)] * 2


def test_preferences_count_tokens_alike_and_references_are_paid_for(tmp_path):
    rivals = compare("dpo", {"chosen": CHAT, "rejected": WORSE}, tmp_path)
    assert list(rivals) == ["minimind", "TRL", "TRL, references before"]
    pair = sum(len(Tokenizer.load().encode_chat(chat)[0]) - 1 for chat in (CHAT, WORSE))
    for name, shown in rivals.items():
        pairs = 128 // pair if name == "minimind" else ROWS  # ours has one row here, of both answers' length
        assert shown["step_tokens"] == [pairs * pair] * 2
        beforehand = name != "TRL"
        assert (shown["done_once_s"] > 0) == beforehand
        assert (shown["tokens_per_s"] < shown["steps_alone_tokens_per_s"]) == beforehand


def test_lora_and_full_fine_tuning_train_on_the_same_rows(tmp_path):
    rivals = compare("lora", {"conversations": CHAT}, tmp_path)
    assert list(rivals) == ["LoRA", "full fine-tuning"]
    assert rivals["LoRA"]["step_tokens"] == rivals["full fine-tuning"]["step_tokens"]


def test_what_is_done_once_is_shared_out_over_the_epochs():
    step = {"tokens": 100, "seconds": 1.0, "once_s": 10.0, "peak_bytes": 1e9}
    shown = result([100.0], [{"data_tokens": 500}, step, step])
    seconds_of_an_epoch = 500 / 100 + 10 / DPO_EPOCHS
    assert shown["tokens_per_s"] == [pytest.approx(500 / seconds_of_an_epoch)]
