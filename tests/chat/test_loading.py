"""Which model `eval_model.py` takes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minimind.chat import cli
from minimind.config import PRESETS, ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.weights import save_weights

from .models import SHORT, save_random


def test_of_several_files_the_default_shape_or_the_smallest_is_taken(tmp_path, capsys):
    def taken(*arguments: str) -> str:
        cli.main(["--out_dir", str(tmp_path), *SHORT, "--prompt", "一", *arguments])
        return capsys.readouterr().err

    save_random(tmp_path / "full_sft_128.pth", hidden_size=128)
    save_random(tmp_path / "full_sft_64.pth")
    save_random(tmp_path / "full_sft_64_moe.pth", num_experts=4)
    (tmp_path / "full_sft_64.backup.pth").write_text("not ours")
    assert "taking full_sft_64.pth; --hidden_size and --use_moe choose another: " in taken()
    assert "\nfull_sft_64_moe.pth" in "\n" + taken("--use_moe")
    assert "taking full_sft_64.pth" in taken("--hidden_size", "64")
    assert "taking full_sft_64.pth" in taken("--use_moe", "False")
    assert "\nfull_sft_128.pth" in "\n" + taken("--hidden_size", "128", "--use_moe", "no")
    save_random(tmp_path / "full_sft_512.pth", hidden_size=512)
    assert "taking full_sft_512.pth" in taken()


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        cli.main(["--device", "cpu", "--prompt", "一", *arguments])
    return str(caught.value)


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    message = refused("--out_dir", str(tmp_path), "--model_mode", "2")
    assert message.endswith(
        f"no rlhf weights; make them with: python trainer/train_dpo.py --out_dir {tmp_path}"
    )
    message = refused("--out_dir", str(tmp_path), "--hidden_size", "768")
    command = f"python trainer/train_full_sft.py --hidden_size 768 --out_dir {tmp_path}"
    assert message.endswith(f"no full_sft weights of the shape asked for; make them with: {command}")
    save_random(tmp_path / "full_sft_64.pth")
    message = refused("--out_dir", str(tmp_path), "--hidden_size", "768")
    assert "no full_sft weights of the shape asked for, but full_sft_64.pth; make them with" in message


def test_weights_of_another_shape_are_refused_with_both_sizes(out, tmp_path):
    message = refused("--out_dir", str(out), "--num_hidden_layers", "8")
    assert "num_hidden_layers 2, but 8" in message
    save_random(tmp_path / "full_sft_256.pth")
    message = refused("--out_dir", str(tmp_path), "--preset", "tiny")
    assert f"hidden_size 64, but {PRESETS['tiny'].hidden_size}" in message


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path):
    save_random(tmp_path / "full_sft_64.pth", vocab_size=123)
    message = refused("--out_dir", str(tmp_path))
    assert "123" in message
    assert str(Tokenizer.load().vocab_size) in message
    assert "--tokenizer_path" in message


def test_damaged_or_diverged_weights_are_refused(tmp_path):
    file = tmp_path / "full_sft_64.pth"
    file.write_bytes(b"half a file")
    assert "is damaged, or not written by a training stage" in refused("--out_dir", str(tmp_path))
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1))
    save_weights(model, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    file.write_bytes(content)
    assert "is damaged, or not written by a training stage" in refused("--out_dir", str(tmp_path))
    torch.save({name: tensor.long() for name, tensor in model.state_dict().items()}, file)
    assert "holds no state dict of tensors" in refused("--out_dir", str(tmp_path))
    model.model.norm.weight.data[3] = torch.nan
    save_weights(model, file)
    assert "not numbers" in refused("--out_dir", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top_p", "0"], "top_p"),
        (["--top_p", "1.5"], "top_p"),
        (["--top_k", "0"], "top_k"),
        (["--min_p", "2"], "min_p"),
        (["--repetition_penalty", "0"], "repetition_penalty"),
        (["--history_cnt", "3"], "history_cnt"),
        (["--max_seq_len", "0"], "max_seq_len"),
        (["--max_seq_len", "1000000"], "32768 positions"),
        (["--max_new_tokens", "-5"], "max_new_tokens"),
        (["--device", "toaster"], "--device toaster"),
        (["--device", "meta"], "--device meta"),
        (["--load", "1"], "--load 1"),
        (["--lora_name", "lora_medical", "--model_mode", "0"], "--model_mode 1 to 4"),
        (["--lora_name", "lora_medical", "poems"], "lora/poems_64.pth (for this model there are: lora_med"),
        (["--lora_name", "lora_medical", "--model_mode", "2"], "lora_medical_64.pth adapts model.layers.1."),
        (["--tokenizer_path", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_values_are_named(out, arguments, words):
    assert words in refused("--out_dir", str(out), *arguments)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [([], None), (["--use_moe"], True), (["--use_moe", "False"], False), (["--use_moe", "0"], False)]
    + [(["--use_moe", word], True) for word in ("True", "1", "yes")],
)
def test_use_moe_means_what_it_says(arguments, meant):
    assert cli.argument_parser().parse_args(arguments).use_moe is meant


def answer_of(capsys, out: Path, *arguments: str) -> pytest.CaptureResult[str]:
    assert cli.main(["--out_dir", str(out), *SHORT, "--temperature", "0", "--prompt", "一", *arguments]) == 0
    return capsys.readouterr()


def test_adapters_are_named_and_change_the_answer(out, capsys):
    plain = answer_of(capsys, out)
    medical = answer_of(capsys, out, "--lora_name", "lora_medical")
    both = answer_of(capsys, out, "--lora_name", "lora_medical", "my_identity")
    assert len({plain.out, medical.out, both.out}) == 3
    assert "\nfull_sft_64.pth + lora_medical + my_identity, " in both.err
    assert both.err.count("was trained beside other weights") == 2  # they were made with a model of their own
    assert "was trained" not in plain.err


def test_lora_none_is_the_seeds_word_for_no_adapter(out, capsys):
    plain = answer_of(capsys, out)
    none = answer_of(capsys, out, "--lora_name", "None")
    assert none.out == plain.out
    assert none.err.startswith("full_sft_64.pth, ")
