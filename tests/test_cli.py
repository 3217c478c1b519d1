"""`minimind merge`, and adapters on their way to and from PEFT."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import ATTENTION, randomise
from test_model import in_transformers, random_model

from minimind.chat import cli as chat
from minimind.cli import main
from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.lora import TARGETS, attach, load_adapters, save_lora
from minimind.weights import load_model, save_weights

SIZE = ["--hidden_size", "64", "--num_hidden_layers", "2"]
DENSE, MOE = (ModelConfig(hidden_size=64, num_hidden_layers=2, num_experts=n) for n in (0, 4))


@pytest.fixture
def out(tmp_path):
    """A chat model and two adapters in `out/`, each dense and as a mixture of experts."""
    for config in (DENSE, MOE):
        save_weights(random_model(config), tmp_path / "out" / f"full_sft_{config.name}.pth")
        for seed, (name, rank, targets) in enumerate([("all", 4, TARGETS), ("attention", 2, ATTENTION)]):
            model = random_model(config)
            attach(model, rank, targets)
            randomise(model, seed)
            save_lora(model.state_dict(), tmp_path / "out" / "lora" / f"{name}_{config.name}.pth")
    return tmp_path / "out"


@pytest.fixture
def minimind(out, monkeypatch):
    """Run a command on `out`."""
    monkeypatch.setattr(sys, "argv", ["minimind"])
    return lambda name, *flags: main([*name.split(), "--out_dir", str(out), *SIZE, *map(str, flags)])


def logits(model) -> torch.Tensor:
    ids = torch.randint(1, 6400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits


def with_adapters(out, *names: str, config: ModelConfig = DENSE):
    model = load_model(out / f"full_sft_{config.name}.pth", "")
    load_adapters(model, [out / "lora" / f"{name}_{config.name}.pth" for name in names], "")
    return model


def peer(out, tmp_path, config: ModelConfig = DENSE):
    """The base model in transformers."""
    folder = tmp_path / f"transformers_{config.name}"
    folder.mkdir(exist_ok=True)
    return in_transformers(load_model(out / f"full_sft_{config.name}.pth", ""), folder)


# ---- Merging ----


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_merge_writes_weights_for_every_command(out, minimind, config, capsys):
    moe = ["--use_moe", "1"] if config.num_experts else []
    assert minimind("merge", "--lora_name", "all", "attention", *moe) == 0
    merged = out / "merged" / f"full_sft_{config.name}.pth"
    assert f"--out_dir {merged.parent}" in capsys.readouterr().out
    expected = logits(with_adapters(out, "all", "attention", config=config))
    assert (logits(load_model(merged, "")) - expected).abs().max() <= 1e-5
    state = torch.load(merged, weights_only=True)
    assert state["model.norm.weight"].dtype == torch.float32
    chat.main(
        ["--out_dir", str(merged.parent), "--prompt", "你好", "--max_new_tokens", "2", "--device", "cpu"]
    )


def test_without_shape_flags_the_files_tell_as_in_a_chat(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimind"])
    assert main(["merge", "--out_dir", str(out), "--lora_name", "all"]) == 0
    assert "taking full_sft_64.pth; --hidden_size and --use_moe choose" in capsys.readouterr().err
    (out / "full_sft_64.pth").unlink()
    folder = out / "peft" / "attention_64_moe"
    assert main(["export", "peft", "--out_dir", str(out), "--lora_name", "attention"]) == 0
    assert (folder / "adapter_config.json").is_file()
    again = ["--lora_name", "again", "--peft_dir", str(folder)]
    assert main(["import", "peft", "--out_dir", str(out), *again]) == 0
    assert (out / "lora" / "again_64_moe.pth").is_file()
    with pytest.raises(
        UserError, match=r"64 --num_hidden_layers 2 --use_moe True --out_dir .* --lora_name x"
    ):
        main(["export", "peft", "--out_dir", str(out), "--lora_name", "x"])


def test_merge_keeps_the_tokenizers_apart(out, minimind):
    minimind("merge", "--lora_name", "all")
    run_file = out / "merged" / "runs" / "full_sft_64" / "run.json"
    run = json.loads(run_file.read_text())
    assert run["merged"] == [str(out / "full_sft_64.pth"), str(out / "lora" / "all_64.pth")]
    run_file.write_text(json.dumps({"tokenizer_fingerprint": "another"}))
    (out / "merged" / "lora").symlink_to(out / "lora")
    with pytest.raises(UserError, match="another tokenizer"):
        main(["merge", "--out_dir", str(out / "merged"), *SIZE, "--lora_name", "all"])


def test_what_merge_refuses(out, minimind):
    with pytest.raises(UserError, match=r"full_sft_64\.pth exists already; choose another --merged_dir"):
        minimind("merge", "--lora_name", "all", "--merged_dir", out)
    with pytest.raises(UserError, match="names all twice"):
        minimind("merge", "--lora_name", "all", "all")
    (out / "file").touch()
    with pytest.raises(
        UserError, match=r"could not write .*file.full_sft_64\.pth: (Not a directory|File exists)$"
    ):
        minimind("merge", "--lora_name", "all", "--merged_dir", out / "file")
    with pytest.raises(
        UserError, match=r"there are: all, attention\); make one with: python trainer/train_lora"
    ):
        minimind("merge", "--lora_name", "none")
    with pytest.raises(UserError, match=r"train_dpo\.py --hidden_size 64 --num_hidden_layers 2"):
        minimind("merge", "--lora_name", "all", "--from_weight", "rlhf")


# ---- PEFT ----


def test_an_adapter_of_peft_is_not_overwritten_or_left_half(out, minimind, monkeypatch):
    with monkeypatch.context() as patch:

        def full(*_args, **_more):
            raise OSError(28, "No space left on device")

        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(UserError, match=r"could not write .*all_64: No space left on device"):
            minimind("export peft", "--lora_name", "all")
    assert not list((out / "peft").iterdir())
    minimind("export peft", "--lora_name", "all")
    with pytest.raises(UserError, match="exists already; choose another --peft_dir"):
        minimind("export peft", "--lora_name", "all")


@pytest.mark.parametrize(
    "damage",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": "many"},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"(": 3}},
    ],
)
def test_scales_that_are_no_numbers_are_refused(out, minimind, damage):
    minimind("export peft", "--lora_name", "all")
    path = out / "peft" / "all_64" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        minimind("import peft", "--lora_name", "again", "--peft_dir", path.parent)


@pytest.mark.parametrize(("name", "config"), [("all", DENSE), ("attention", MOE)], ids=["dense", "moe"])
def test_real_peft_reads_what_is_exported(out, minimind, tmp_path, name, config):
    moe = ["--use_moe", "1"] if config.num_experts else []
    minimind("export peft", "--lora_name", name, "--base_model", "some/model", *moe)
    folder = out / "peft" / f"{name}_{config.name}"
    theirs = PeftModel.from_pretrained(peer(out, tmp_path, config), folder)
    settings = theirs.peft_config["default"]
    assert settings.base_model_name_or_path == "some/model"
    assert settings.target_modules == set(TARGETS if name == "all" else ATTENTION)
    assert (settings.r, settings.lora_alpha) == ((4, 4) if name == "all" else (2, 2))
    expected = logits(with_adapters(out, name, config=config))
    assert (logits(theirs) - expected).abs().max() <= 1e-5

    minimind("import peft", "--lora_name", "again", "--peft_dir", folder, *moe)
    ours, again = (torch.load(out / "lora" / f"{n}_{config.name}.pth") for n in (name, "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.items())


def test_ranks_that_differ_are_exported_too(out, minimind, tmp_path):
    """As an adapter that came from PEFT may have them."""
    state = torch.load(out / "lora" / "all_64.pth")
    place = "model.layers.1.mlp.up_proj.lora"
    state |= {f"{place}.A.weight": torch.randn(3, 64), f"{place}.B.weight": torch.randn(192, 3)}
    torch.save(state, out / "lora" / "all_64.pth")
    minimind("export peft", "--lora_name", "all")
    theirs = PeftModel.from_pretrained(peer(out, tmp_path), out / "peft" / "all_64")
    assert (logits(theirs) - logits(with_adapters(out, "all"))).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 10},
        },
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_adapters_that_real_peft_saved_are_imported(out, minimind, tmp_path, settings):
    theirs = get_peft_model(
        peer(out, tmp_path), LoraConfig(target_modules=["q_proj", "down_proj"], **settings)
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    minimind("import peft", "--lora_name", "theirs", "--peft_dir", tmp_path / "theirs")
    assert (logits(with_adapters(out, "theirs")) - logits(theirs)).abs().max() <= 1e-5
    with pytest.raises(UserError, match="exists already; choose another --lora_name"):
        minimind("import peft", "--lora_name", "theirs", "--peft_dir", tmp_path / "theirs")


def test_adapters_of_experts_are_not_for_peft(out, minimind):
    with pytest.raises(UserError, match=r"experts\.0\.gate_proj cannot .* instead: minimind merge"):
        minimind("export peft", "--lora_name", "all", "--use_moe", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora True, and only plain LoRA"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"lora_alpha": None}, "damaged, or not of a LoRA adapter"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(out, minimind, change, message):
    minimind("export peft", "--lora_name", "all")
    path = out / "peft" / "all_64" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        minimind("import peft", "--lora_name", "x", "--peft_dir", path.parent)


def test_folders_that_cannot_be_imported(out, minimind, tmp_path):
    with pytest.raises(UserError, match=r"is no PEFT adapter: .* with --peft_dir"):
        minimind("import peft", "--lora_name", "x", "--peft_dir", tmp_path)
    minimind("export peft", "--lora_name", "all")
    folder = out / "peft" / "all_64"
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            minimind("import peft", "--lora_name", "x", "--peft_dir", folder)

    head = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {head: torch.zeros(4, 64)}, weights)
    refused("adapts lm_head, no projection of this model")
    save_file(tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}, weights)
    refused("holds .*lora_embedding_A, and only plain LoRA")
    weights.write_bytes(b"cut short")
    refused("cannot be read")
    weights.rename(folder / "adapter_model.bin")
    refused("a pickle, which can run code, and is not read; write it with")
    with pytest.raises(UserError, match="--lora_name is"):
        minimind("import peft", "--lora_name", "../x", "--peft_dir", folder)
