"""Models from elsewhere come in as they were, or are refused with the reason."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import logits
from test_model import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

from minimind.chat import cli as chat
from minimind.errors import UserError
from minimind.export.huggingface import minimind_config, minimind_state_dict, transformers_state_dict
from minimind.paths import TOKENIZER_DIR
from minimind.tokenizer import Tokenizer
from minimind.weights import load_model, load_state

from .conftest import CONFIGS, SIZE, load_peer, shape


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_comes_back_as_it_was(kind, out, minimind, tmp_path):
    config = CONFIGS[kind]
    weights = out / f"full_sft_{config.name}.pth"
    minimind("export hf", tmp_path / "hf", *shape(config))
    before = load_state(weights, "")
    weights.unlink()
    assert minimind("import hf", tmp_path / "hf") == 0
    after = load_state(weights, "")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (
        weights.stat().st_size
        < 1.02 * sum(t.nbytes for n, t in before.items() if n != "lm_head.weight") + 2e5
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saves_comes_back(kind, out, minimind, tmp_path):
    """In several files, in bf16, with a tokenizer that has been used."""
    config = CONFIGS[kind]
    minimind("export hf", tmp_path / "hf", *shape(config))
    theirs, tokenizer = load_peer(tmp_path / "hf")
    tokenizer(["你好", "a longer text"], padding=True, truncation=True, max_length=3)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert minimind("import hf", tmp_path / "saved", "--stage", "reason") == 0
    ours = load_model(out / f"reason_{config.name}.pth", "")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert (logits(ours) - logits(saved)).abs().max() <= 1e-5
    run = json.loads((out / f"runs/reason_{config.name}/run.json").read_text())
    assert run["tokenizer_fingerprint"] == Tokenizer.load().fingerprint  # still the shipped one
    assert run["imported"] == str(tmp_path / "saved")


def test_two_shared_experts_come_back():
    config = replace(CONFIGS["moe"], num_shared_experts=2)
    before = random_model(config).state_dict()
    after = minimind_state_dict(transformers_state_dict(before, config), config)
    assert after.keys() | {"lm_head.weight"} == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_another_tokenizer_comes_along(out, minimind, tmp_path, capsys):
    minimind("export hf", tmp_path / "hf", *SIZE)
    text = (tmp_path / "hf/tokenizer.json").read_text().replace('"你好"', '"你不好"')
    vocabulary = json.loads(text)
    vocabulary["model"]["merges"][-1], vocabulary["model"]["merges"][-2] = vocabulary["model"]["merges"][-2:]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(vocabulary))
    minimind("import hf", tmp_path / "hf", "--stage", "reason")
    kept = out / "runs/reason_64/tokenizer"
    assert f"give every command --tokenizer_path {kept}" in capsys.readouterr().out
    arguments = ["--out_dir", str(out), "--model_mode", "3", "--prompt", "a", "--max_new_tokens", "2"]
    with pytest.raises(UserError, match="another tokenizer"):
        chat.main(arguments)
    assert chat.main([*arguments, "--tokenizer_path", str(kept)]) == 0


PLAIN = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for message in %}", "it cannot chat: the chat template in .*hf cannot render .*: Expected"),
        ("{{ messages[3].content }}", "it cannot chat: the chat template in .*hf cannot render"),
        ("", "it cannot chat: .*hf has no chat template"),
        (PLAIN, r"the chat template in .*hf has no \{% generation %\} around answers"),
        (PLAIN.replace("{{", "{% generation %}{{").replace("}}", "}}{% endgeneration %}"), None),
    ],
)
def test_a_chat_template_that_fails_is_told(template, said, out, minimind, tmp_path, capsys):
    minimind("export hf", tmp_path / "hf", *SIZE)
    (tmp_path / "hf/chat_template.jinja").write_text(template)
    capsys.readouterr()
    for stage, told in (("reason", said), ("pretrain", None)):
        minimind("import hf", tmp_path / "hf", "--stage", stage)
        _weights, tokenizer, *more = capsys.readouterr().out.splitlines()
        assert tokenizer.startswith("it has a tokenizer of its own")
        assert len(more) == (told is not None)
        if told:
            assert re.match(f"{told}.*; mend it there, delete {out}/{stage}_64.pth and import", more[0])


def test_weights_and_runs_are_not_overwritten(out, minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *SIZE)
    with pytest.raises(
        UserError, match=r"full_sft_64\.pth or its run exists already; choose another --stage"
    ):
        minimind("import hf", tmp_path / "hf")
    (out / "runs/reason_64/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="or its run exists already"):
        minimind("import hf", tmp_path / "hf", "--stage", "reason")


@pytest.fixture
def exported(minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *SIZE)
    return tmp_path / "hf"


def change(folder, **settings) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mistral"}, "a model of type 'mistral'; MiniMind is a llama"),
        ({"model_type": "minimind"}, "MiniMind2's own format; import its weight file alone"),
        ({"model_type": None}, "a model of type None"),
        ({"num_key_value_heads": 8}, "cannot express: num_key_value_heads 8 instead of 2"),
        ({"num_key_value_heads": None}, "num_key_value_heads 8 instead of 2"),
        ({"num_attention_heads": 3}, "cannot express: hidden_size 64 in 3 heads"),
        ({"intermediate_size": 160}, "intermediate_size 160 instead of 192"),
        ({"head_dim": 16}, "head_dim 16 instead of 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' instead of 'silu'"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias True instead of False, mlp_bias True"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 instead of 1e-05"),
        ({"rms_norm_eps": None}, "rms_norm_eps 1e-06 instead of 1e-05"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta 10000.0 instead of 1000000.0"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_type 'llama3' instead of"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type 'linear' instead of"),
        ({"rope_parameters": 3}, "rope_type 3 instead of"),
        ({"quantization_config": {"bits": 4}}, "quantization_config 'set' instead of None"),
        ({"vocab_size": "6400"}, "damaged: its vocab_size is '6400', and should be a size"),
        ({"hidden_size": True}, "damaged: its hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "damaged: its num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "lacks tensors of some of its 1000000 layers"),
        ({"num_hidden_layers": 1}, "does not fit a model of this shape: Unexpected key"),
        ({"max_position_embeddings": -1}, "damaged: its max_position_embeddings is -1"),
        ({"vocab_size": 6401}, "does not fit a model of this shape: size mismatch"),
    ],
)
def test_a_model_that_minimind_cannot_express_is_refused(settings, message, exported, minimind):
    change(exported, **settings)
    with pytest.raises(UserError, match=message) as raised:
        minimind("import hf", exported, "--stage", "reason")
    assert str(exported) in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_local_experts": 1}, "num_local_experts 1"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok 3 instead of 2"),
        ({"shared_intermediate_size": 200}, "shared_intermediate_size 200 instead of 192"),
        ({"shared_intermediate_size": 0}, "damaged: its shared_intermediate_size is 0"),
        (
            {"residual_multiplier": 0.2, "logits_scaling": 6.0},
            "logits_scaling 6.0 instead of 1.0, residual_mul",
        ),
        ({"attention_multiplier": None}, r"attention_multiplier 1\.0 instead of 0\.35"),
    ],
)
def test_a_granite_that_minimind_cannot_express_is_refused(settings, message, minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *shape(CONFIGS["moe"]))
    change(tmp_path / "hf", **settings)
    with pytest.raises(UserError, match=message):
        minimind("import hf", tmp_path / "hf", "--stage", "reason")


def test_models_of_others_are_refused_or_read_as_they_are(minimind, out, exported, tmp_path):
    """Configurations that transformers itself writes, most settings left to its defaults."""
    sizes = {"vocab_size": 6400, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8}
    fitting = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e6}}
    for config, message in (
        (GPT2Config(), "a model of type 'gpt2'"),
        (LlamaConfig(), "intermediate_size 11008 instead of 10944.*num_key_value_heads 32 instead of 2"),
        (LlamaConfig(**sizes), "num_key_value_heads 8"),
    ):
        config.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=message):
            minimind("import hf", tmp_path / "other")
    for tied, name in ((True, "tied"), (False, "untied")):
        config = LlamaConfig(**sizes, **fitting, num_hidden_layers=1, tie_word_embeddings=tied)
        assert minimind_config(json.loads(config.to_json_string()), tmp_path).num_hidden_layers == 1
        theirs = LlamaForCausalLM(config)
        theirs.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(tmp_path / name)
        if not tied:
            with pytest.raises(UserError, match="cannot express: its embeddings are not tied"):
                minimind("import hf", tmp_path / name, "--stage", "reason")
            theirs.lm_head.weight = torch.nn.Parameter(theirs.model.embed_tokens.weight.clone())
            theirs.save_pretrained(tmp_path / name)
        (out / "reason_64.pth").unlink(missing_ok=True)
        minimind("import hf", tmp_path / name, "--stage", "reason")
        assert (logits(load_model(out / "reason_64.pth", "")) - logits(theirs)).abs().max() <= 1e-5


def test_a_path_that_safetensors_cannot_take_is_told(exported, minimind):
    other = exported.rename(exported.with_name(os.fsdecode(b"\xff")))
    with pytest.raises(UserError, match="is not valid UTF-8"):
        minimind("import hf", other, "--stage", "reason")


def test_folders_that_are_damaged(exported, minimind):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            minimind("import hf", exported, "--stage", "reason")

    tensors = load_file(exported / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "k_proj" not in n}, exported / "model.safetensors")
    refused("lacks tensors|does not fit a model of this shape: Missing key")
    save_file(tensors | {"model.norm.weight": torch.full((64,), torch.nan)}, exported / "model.safetensors")
    refused("weights that are not numbers")
    save_file(tensors | {"model.norm.weight": torch.ones(64) + 1j}, exported / "model.safetensors")
    refused("tensors that are no real numbers")
    (exported / "model.safetensors").write_bytes(b"half")
    refused(r"model\.safetensors cannot be read \(.*header.*\); copy it again")
    (exported / "model.safetensors").unlink()
    (exported / "pytorch_model.bin").touch()
    refused(r"no .*model\.safetensors; pytorch_model\.bin is a pickle, which can run code, and is not read")
    index = exported / "model.safetensors.index.json"
    for places in ({"a": "../../etc/passwd"}, {"a": 3}, {"a": "/x.safetensors"}, []):
        index.write_text(json.dumps({"weight_map": places}))
        refused(r"index\.json is damaged")
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(r"there is no .*model-00001-of-00002\.safetensors")
    for text in ("{", "[]", "\udc80"):
        (exported / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(r"config\.json is damaged; copy it again")
    (exported / "config.json").unlink()
    refused(r"there is no .*config\.json; name a folder that")


@pytest.mark.parametrize("part", ["router.layer", "input_linear", "output_linear", "shared"])
@pytest.mark.parametrize("size", [(), (3,), (1, 64, 384), (3, 64, 64)])
def test_experts_of_another_shape_are_refused(part, size, minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *shape(CONFIGS["moe"]))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    name = next(name for name in tensors if part in name)
    save_file(tensors | {name: torch.zeros(size)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match="does not fit a model of this shape"):
        minimind("import hf", tmp_path / "hf", "--stage", "reason")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not JSON: it holds no object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
    ],
)
def test_tokenizers_that_are_damaged(name, text, message, exported, minimind):
    (exported / name).write_text(text)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        minimind("import hf", exported, "--stage", "reason")


def test_a_template_that_refuses_system_messages_comes_along(exported, minimind, out):
    """And one that is a list of several in tokenizer_config.json counts as none."""
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}…"
    (exported / "chat_template.jinja").write_text(template)
    assert minimind("import hf", exported, "--stage", "reason") == 0
    kept = out / "runs/reason_64/tokenizer"
    assert (kept / "chat_template.jinja").read_text() == template
    (kept / "chat_template.jinja").unlink()
    (kept / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "x"}]}')
    assert Tokenizer.load(kept).chat_template == ""


# ---- Weight files from elsewhere ----


def test_a_published_weight_file_comes_in(out, minimind, tmp_path, capsys):
    """As MiniMind2 published them: fp16, with its rotation tables in it."""
    state = load_state(out / "full_sft_64.pth", "")
    tables = {"model.freqs_cos": torch.rand(64, 8), "model.freqs_sin": torch.rand(64, 8)}
    torch.save(state | tables, tmp_path / "full_sft_64.pth")
    assert minimind("import pth", tmp_path / "full_sft_64.pth", "--stage", "full_dist") == 0
    after = load_state(out / "full_dist_64.pth", "")
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert "no tokenizer came with it" in capsys.readouterr().out


def test_weight_files_that_cannot_come_in(minimind, tmp_path):
    for content, message in (
        (b"", "is damaged"),
        ({"model": 3}, "no state dict of tensors"),
        ({"tok_embeddings.weight": torch.zeros(4, 4)}, "holds no MiniMind model"),
    ):
        if isinstance(content, bytes):
            (tmp_path / "x.pth").write_bytes(content)
        else:
            torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=message):
            minimind("import pth", tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"there is no .*nowhere\.pth"):
        minimind("import pth", tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("command", "what"), [("export hf", "FOLDER"), ("import hf", "SOURCE"), ("import pth", "SOURCE")]
)
def test_what_to_write_or_read_must_be_said(minimind, capsys, command, what):
    with pytest.raises(SystemExit) as ended:
        minimind(command)
    assert ended.value.code == 2
    assert f"the following arguments are required: {what}" in capsys.readouterr().err
