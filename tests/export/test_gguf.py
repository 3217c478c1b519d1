"""GGUF files, against the gguf package's reader and against llama.cpp itself."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from test_model import random_model
from test_tokenizer import CONVERSATION, MINIMIND2, needs_shared

from minimind.chat_template import compile_template
from minimind.errors import UserError
from minimind.export.gguf import gguf_tensors, gguf_writer, write
from minimind.export.ollama import modelfile
from minimind.export.options import WeightOptions
from minimind.paths import ROOT, TOKENIZER_DIR
from minimind.tokenizer import Tokenizer
from minimind.weights import load_model, save_weights

from .conftest import CONFIGS, DENSE, KNOWN, SIZE, shape

LLAMA_CPP = ROOT / "tests" / "llama_cpp"


def missing() -> str | None:
    if not shutil.which("node"):
        return "needs node"
    if not (LLAMA_CPP / "node_modules" / "node-llama-cpp").is_dir():
        return "needs llama.cpp: make llamacpp"
    return None


needs_llama_cpp = pytest.mark.skipif(missing() is not None, reason=missing() or "")

MIXED = [
    "你好，世界！Hello, world. 2026-01-15 3.14159 １２３ Ⅷ ½",
    "def f(x: int) -> str:\n\tif x >= 10:\n        return f'{x:>8}'  # 注释\n\n\nprint(f(42))\r\n",
    "🦜🇨🇳👨‍👩‍👧‍👦 ☀️ 鱻龘𠮷 naïve e\u0301 한국어 日本語 العربية ٣",
    "  It's WE'LL don’t I'D   and  trail \n \n\t ",
    "<think>\n1+1=2\n</think>\n<answer>\n二\n</answer>",
    "\u3000全角　空格\u200b零宽\xa0硬 \x00\x7f",
]


@pytest.fixture
def llama_cpp(tmp_path):
    """Ask llama.cpp about a file; see llama_cpp.mjs for what it tells."""

    def ask(model, texts=(), prompts=(), tokens=0):
        request = tmp_path / "request.json"
        request.write_text(
            json.dumps(
                {"model": str(model), "texts": list(texts), "prompts": list(prompts), "tokens": tokens}
            )
        )
        command = ["node", str(LLAMA_CPP / "llama_cpp.mjs"), str(request)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@torch.no_grad()
def likeliest(model, prompt, tokens) -> tuple[list[int], torch.Tensor]:
    """What follows `prompt`, always the likeliest token of all, and the probability of each."""
    ids, probabilities = list(prompt), []
    for _ in range(tokens):
        distribution = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        ids.append(distribution.argmax().item())
        probabilities.append(distribution.max())
    return ids[len(prompt) :], torch.stack(probabilities)


def questions() -> list[list[int]]:
    tokenizer = Tokenizer.load()
    return [tokenizer.encode_chat([{"role": "user", "content": q}], True)[0] for q in KNOWN]


# ---- llama.cpp itself ----


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_answers_and_stops_as_we_do(kind, dtype, minimind, tmp_path, llama_cpp):
    file = tmp_path / "model.gguf"
    minimind("export gguf", file, *shape(CONFIGS[kind]), "--from_weight", "rlhf", "--dtype", dtype)
    told = llama_cpp(file, prompts=questions(), tokens=60)
    assert [Tokenizer.load().decode(answer) for answer in told["answers"]] == list(KNOWN.values())
    assert told["ended"] == [True] * len(KNOWN)
    assert told["eos"] == 2


@needs_llama_cpp
@pytest.mark.parametrize("config", [*CONFIGS.values(), replace(CONFIGS["moe"], num_shared_experts=2)])
def test_llama_cpp_computes_the_same(config, tmp_path, llama_cpp):
    """Random weights, and a prompt long enough for rotations to matter."""
    model = random_model(config).eval()
    write(gguf_writer(model, Tokenizer.load(), "f32", "random"), tmp_path / "model.gguf")
    prompt = torch.randint(3, 6400, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    told = llama_cpp(tmp_path / "model.gguf", prompts=[prompt], tokens=20)
    answer, probabilities = likeliest(model, prompt, 20)
    assert not {0, 2} & set(answer)  # it would have ended there
    assert told["answers"] == [answer]
    # Its cache holds keys and values in fp16.
    assert (torch.tensor(told["probabilities"][0]) - probabilities).abs().max() <= 2e-3
    assert probabilities.max() < 0.9  # not a matter of course


@needs_llama_cpp
@pytest.mark.parametrize(
    "directory", [TOKENIZER_DIR, pytest.param(MINIMIND2, marks=needs_shared)], ids=["ours", "mm2"]
)
def test_llama_cpp_reads_text_as_we_do(directory, tmp_path, llama_cpp):
    tokenizer = Tokenizer.load(directory)
    write(gguf_writer(random_model(DENSE), tokenizer, "f16", "test"), tmp_path / "model.gguf")
    everywhere = "".join(f"x{chr(c)}y {chr(c)}1\n" for c in range(1, 0x3400, 7))
    chat = tokenizer.render_chat(CONVERSATION, add_generation_prompt=True)
    told = llama_cpp(tmp_path / "model.gguf", texts=[*MIXED, everywhere, chat])
    expected = [tokenizer.encode(text) for text in (*MIXED, everywhere)]
    expected.append(tokenizer.encode_chat(CONVERSATION, add_generation_prompt=True)[0])
    assert told["tokens"] == expected
    template = compile_template(told["chatTemplate"])
    assert "generation %}" not in told["chatTemplate"]
    assert template.render(messages=CONVERSATION, add_generation_prompt=True) == chat


# ---- What is in the file ----


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_tensors(kind, dtype, out, minimind, tmp_path):
    config = CONFIGS[kind]
    minimind("export gguf", tmp_path / "model.gguf", *shape(config), "--dtype", dtype)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    expected = dict(gguf_tensors(load_model(out / f"full_sft_{config.name}.pth", "")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        values = torch.from_numpy(np.array(dequantize(found[name].data, found[name].tensor_type)))
        exact = dtype != "q8_0" or tensor.dim() == 1 or "gate_inp" in name  # weight files are fp16
        error = (values.view(tensor.shape) - tensor).abs().max()
        assert error == 0 if exact else 0 < error <= tensor.abs().max() / 127
        assert found[name].tensor_type.name == (
            dtype.upper() if tensor.dim() > 1 and "gate_inp" not in name else "F32"
        )


def test_adapters_are_merged_in(minimind, tmp_path):
    for name, more in (("plain", []), ("merged", ["--lora_name", "mine"])):
        minimind("export gguf", tmp_path / f"{name}.gguf", *SIZE, *more, "--dtype", "f32")
    plain, merged = (GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("plain", "merged"))
    changed = {a.name for a, b in zip(plain, merged, strict=True) if not np.array_equal(a.data, b.data)}
    assert "blk.0.attn_q.weight" in changed
    assert "output_norm.weight" not in changed


def test_rows_that_are_no_whole_blocks_stay_in_fp16(minimind, out, tmp_path):
    config = replace(DENSE, hidden_size=48)
    save_weights(random_model(config), out / "full_sft_48.pth")
    minimind(
        "export gguf", tmp_path / "m.gguf", "--hidden_size", 48, "--num_hidden_layers", 2, "--dtype", "q8_0"
    )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_tokenizers_that_llama_cpp_does_not_know_are_refused(tmp_path):
    content = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x|y"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"llama\.cpp has no name for the way in which the tokenizer in"):
        gguf_writer(random_model(DENSE), Tokenizer.load(tmp_path), "f16", "test")


def test_numbers_too_large_are_refused(minimind, out, tmp_path):
    model = random_model(DENSE)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    torch.save(model.state_dict(), out / "full_sft_64.pth")
    with pytest.raises(UserError, match=r"f16 cannot hold a number in blk\.0\.ffn_up\.weight; choose f32"):
        minimind("export gguf", tmp_path / "model.gguf", *SIZE)
    assert minimind("export gguf", tmp_path / "model.gguf", *SIZE, "--dtype", "f32") == 0


def test_nothing_is_overwritten_or_left_half(minimind, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"model\.gguf exists already; move it or name another"):
        minimind("export gguf", tmp_path / "model.gguf", *SIZE)
    assert (tmp_path / "model.gguf").read_text() == "mine"

    for error, reason in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("100 requested and 0 written"), "the write broke off"),  # numpy's way to say it
    ):

        def full(*_args, error=error, **_more):
            raise error

        monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", full)
        for name, target in (("gguf", "other.gguf"), ("ollama", "folder")):
            with pytest.raises(UserError, match=rf"could not write {tmp_path / target}: {reason}; "):
                minimind(f"export {name}", tmp_path / target, *SIZE)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model.gguf"}


@pytest.mark.parametrize("name", ["hf", "gguf", "ollama"])
def test_of_two_exports_at_once_the_faster_stays(minimind, tmp_path, monkeypatch, name):
    target = tmp_path / "model"
    load = WeightOptions.load

    def slowly(options):
        loaded = load(options)
        monkeypatch.setattr(WeightOptions, "load", load)
        assert minimind(f"export {name}", target, *SIZE) == 0
        return loaded

    monkeypatch.setattr(WeightOptions, "load", slowly)
    with pytest.raises(UserError, match="model exists already; move it or name another"):
        minimind(f"export {name}", target, *SIZE, "--from_weight", "rlhf")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model"}
    main = {"hf": "README.md", "ollama": "model.gguf", "gguf": ""}[name]
    assert b"full_sft_64" in (target / main).read_bytes()


@pytest.mark.parametrize(("name", "what"), [("gguf", "FILE"), ("ollama", "FOLDER")])
def test_where_to_write_must_be_said(minimind, capsys, name, what):
    with pytest.raises(SystemExit) as ended:
        minimind(f"export {name}", *SIZE)
    assert ended.value.code == 2
    assert f"the following arguments are required: {what}" in capsys.readouterr().err


def test_without_the_package_the_mend_is_named(minimind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the gguf package: pip install -e '/.*\[export\]'"):
        minimind("export gguf", tmp_path / "model.gguf", *SIZE)


# ---- ollama ----


def test_the_ollama_folder(minimind, tmp_path):
    assert minimind("export ollama", tmp_path / "folder", *SIZE, "--dtype", "q8_0") == 0
    lines = (tmp_path / "folder/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER temperature 0.85" in lines
    assert "PARAMETER repeat_last_n 64" in lines
    assert not [line for line in lines if line.startswith("SYSTEM")]
    minimind("export gguf", tmp_path / "model.gguf", *SIZE, "--dtype", "q8_0")
    assert (tmp_path / "folder/model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_the_line_for_ollama_can_be_pasted(minimind, tmp_path, capsys):
    minimind("export ollama", tmp_path / "a b", *SIZE)
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line) == ["ollama", "create", "minimind", "-f", str(tmp_path / "a b" / "Modelfile")]


@needs_shared
def test_the_system_prompt_that_a_template_brings_is_told():
    assert 'SYSTEM """You are a helpful assistant"""' in modelfile(Tokenizer.load(MINIMIND2)).splitlines()


def test_templates_that_ollama_is_not_told_of_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text((TOKENIZER_DIR / "tokenizer.json").read_text())
    for template in (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
        "Hi!" + Tokenizer.load().chat_template,
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match="ollama can be told of ChatML alone"):
            modelfile(Tokenizer.load(tmp_path))


def test_llama_cpp_is_asked_for_by_make():
    """The reason that skipped tests give must be a command there is."""
    assert "\nllamacpp:" in (ROOT / "Makefile").read_text()
