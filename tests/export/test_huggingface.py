"""Folders in Hugging Face's format, against transformers: out, back in, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from test_cli import logits
from test_model import random_model

from minimind.chat import cli as chat
from minimind.chat.generate import generate
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.errors import UserError
from minimind.export import folder as module
from minimind.lora import load_adapters
from minimind.paths import ROOT
from minimind.tokenizer import Tokenizer
from minimind.weights import load_model

from .conftest import CONFIGS, DENSE, KNOWN, SIZE, load_peer, shape

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=40)


# ---- Out ----


@pytest.mark.parametrize(("kind", "architecture"), [("dense", "Llama"), ("moe", "GraniteMoeShared")])
def test_transformers_computes_the_same_without_code_of_ours(kind, architecture, out, minimind, tmp_path):
    config = CONFIGS[kind]
    assert minimind("export hf", tmp_path / "hf", *shape(config)) == 0
    theirs, _ = load_peer(tmp_path / "hf")
    ours = load_model(out / f"full_sft_{config.name}.pth", "")
    assert type(theirs).__name__ == f"{architecture}ForCausalLM"
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [type(theirs).__name__]
    assert theirs.dtype == torch.float32
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5
    assert not list((tmp_path / "hf").glob("*.py"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_writes_the_same_answers(kind, out, minimind, tmp_path):
    config = CONFIGS[kind]
    minimind("export hf", tmp_path / "hf", *shape(config), "--from_weight", "rlhf")
    theirs, tokenizer = load_peer(tmp_path / "hf")
    ours = InferenceModel(load_model(out / f"rlhf_{config.name}.pth", ""), "fp32")
    for question, expected in KNOWN.items():
        messages = [{"role": "user", "content": question}]
        ids = Tokenizer.load().encode_chat(messages, add_generation_prompt=True)[0]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"].tolist() == [ids]
        answer = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)[0, len(ids) :].tolist()
        assert answer[-1] == tokenizer.eos_token_id == 2
        assert answer[:-1] == list(generate(ours, ids, GREEDY))
        assert tokenizer.decode(answer, skip_special_tokens=True) == expected


def test_transformers_stops_where_our_chat_does(minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *SIZE)
    theirs, _ = load_peer(tmp_path / "hf")
    settings = theirs.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([2, 0], 0)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.85, 0.85, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_weights(dtype, out, minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *SIZE, "--dtype", dtype)
    theirs, _ = load_peer(tmp_path / "hf")
    assert theirs.dtype == getattr(torch, dtype)
    ours = load_model(out / "full_sft_64.pth", "").to(theirs.dtype).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


def test_numbers_too_large_for_a_format_are_refused(out, minimind, tmp_path):
    model = random_model(DENSE)
    model.model.norm.weight.data[3] = 1e5
    torch.save(model.state_dict(), out / "full_sft_64.pth")
    with pytest.raises(UserError, match=r"float16 cannot hold a number in model\.norm\.weight; choose"):
        minimind("export hf", tmp_path / "hf", *SIZE, "--dtype", "float16")
    assert not (tmp_path / "hf").exists()


def test_adapters_are_merged_in(out, minimind, tmp_path):
    minimind("export hf", tmp_path / "hf", *SIZE, "--lora_name", "mine")
    ours = load_model(out / "full_sft_64.pth", "")
    plain = logits(ours)
    load_adapters(ours, [out / "lora" / "mine_64.pth"], "")
    assert (logits(ours) - logits(load_peer(tmp_path / "hf")[0])).abs().max() <= 1e-5
    assert (logits(ours) - plain).abs().max() > 0.1
    assert "adapters merged in | `mine`" in (tmp_path / "hf/README.md").read_text()


def test_transformers_4_finds_its_names(minimind, tmp_path):
    """It knows no `rope_parameters`, and would turn by 10,000 in silence."""
    minimind("export hf", tmp_path / "hf", *SIZE)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "float32"


def test_the_card_says_what_the_run_knows(out, minimind, tmp_path):
    minimind("export hf", tmp_path / "bare", *SIZE)
    bare = (tmp_path / "bare/README.md").read_text()
    assert "| parameters | 0.50 M |" in bare
    assert "SHA-256" not in bare
    run_file = out / "runs/full_sft_64/run.json"
    run_file.parent.mkdir(parents=True)
    run = {
        "stage": "full_sft",
        "data_sha256": "abc123",
        "total_steps": 77,
        "options": {"data_path": "/home/me"},
    }
    run_file.write_text(json.dumps(run))
    minimind("export hf", tmp_path / "told", *SIZE)
    told = (tmp_path / "told/README.md").read_text()
    for row in (
        "| stage | `full_sft` |",
        "| SHA-256 of the training data | `abc123` |",
        "| optimizer steps | `77` |",
    ):
        assert row in told
    assert "/home/me" not in told
    assert "license: apache-2.0" in told
    for broken in ("[1]", "{", '{"stage": {"a": 1}}'):
        run_file.write_text(broken)
        minimind("export hf", tmp_path / f"broken{len(broken)}", *SIZE)


@pytest.mark.parametrize("stage", ["rlhf", "pretrain"])
def test_the_example_on_the_card_runs(stage, out, minimind, tmp_path, monkeypatch, capsys):
    (out / "rlhf_64.pth").rename(out / f"{stage}_64.pth")
    minimind("export hf", tmp_path / "hf", *SIZE, "--from_weight", stage)
    example = (tmp_path / "hf/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "hf")
    capsys.readouterr()
    exec(example, {})
    assert capsys.readouterr().out.strip()


# ---- Which weights ----


def test_without_shape_flags_the_files_tell(minimind, tmp_path, capsys):
    assert minimind("export hf", tmp_path / "hf") == 0
    captured = capsys.readouterr()
    assert "MiniMind full_sft_64 as LlamaForCausalLM" in captured.out
    assert captured.err.count("taking full_sft_64.pth; --hidden_size and --use_moe choose another") == 1
    with pytest.raises(UserError, match="num_hidden_layers 2, but 3 was asked for"):
        minimind("export hf", tmp_path / "other", "--num_hidden_layers", "3")


def test_a_stage_that_is_none_is_refused(minimind, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        minimind("export hf", tmp_path / "hf", "--from_weight", "fullsft")
    assert "choose from" in capsys.readouterr().err


# ---- Never half, never over something ----


def test_nothing_is_overwritten(minimind, tmp_path):
    (tmp_path / "hf").mkdir()
    assert minimind("export hf", tmp_path / "hf", *SIZE) == 0  # an empty folder is no loss
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(UserError, match="hf exists already; move it or name another"):
        minimind("export hf", tmp_path / "hf", *SIZE)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    for other in (tmp_path / "not_there" / ".." / "hf", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match="exists already"):
            minimind("export hf", other, *SIZE)


def test_a_write_that_fails_leaves_nothing(minimind, tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"could not write .*hf: No space left on device; [\d,]+ MB are free"):
        minimind("export hf", tmp_path / "hf", *SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "number"),
    [("export hf", signal.SIGINT), ("export hf", signal.SIGTERM), ("export gguf", signal.SIGTERM)],
)
def test_a_signal_ends_an_export_without_remains(name, number, out, tmp_path):
    """It comes in the middle of the write, as the first bytes are synchronised with the disk."""
    script = (
        "import os; from minimind import files; from minimind.cli import run\n"
        f"files.os.fsync = lambda _: os.kill(os.getpid(), {int(number)})\n"
        "run()"
    )
    command = [*name.split(), str(tmp_path / "made"), "--out_dir", str(out), *SIZE, "--use_moe", "0"]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(minimind, tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from minimind.files import atomic_folder\n"
        f"with atomic_folder(Path({str(tmp_path / 'hf')!r})) as folder:\n"
        "    (folder / 'half').write_text('…'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert [path.name[:4] for path in tmp_path.iterdir() if path.name != "out"] == [".hf."]
    minimind("export hf", tmp_path / "hf", *SIZE)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "hf"}
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1  # all may read all


# ---- Chat ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_eval_model_chats_with_a_folder(kind, out, minimind, tmp_path, capsys):
    config = CONFIGS[kind]
    minimind("export hf", tmp_path / "hf", *shape(config), "--from_weight", "rlhf")
    capsys.readouterr()
    questions = [word for question in KNOWN for word in ("--prompt", question)]
    greedy = ["--temperature", "0", "--repetition_penalty", "1", "--weights", "fp32", "--device", "cpu"]
    for load in (["--load", "1"], []):
        assert chat.main([*load, "--hf_dir", str(tmp_path / "hf"), *greedy, *questions]) == 0
        printed = capsys.readouterr()
        assert printed.out == "".join(f"{answer}\n" for answer in KNOWN.values())
        assert printed.err.startswith("hf, ")


def test_eval_model_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="--load 1 reads a transformers directory; name it with --hf_dir"):
        chat.main(["--load", "1", "--prompt", "a"])
    with pytest.raises(UserError, match=r"nowhere is no directory; `minimind export hf FOLDER` writes one"):
        chat.main(["--hf_dir", str(tmp_path / "nowhere"), "--prompt", "a"])


@pytest.mark.parametrize("name", ["export hf", "import hf", "import pth", "export gguf", "export ollama"])
def test_help_does_not_wait_for_torch(name):
    command = [sys.executable, "-X", "importtime", "-m", "minimind", *name.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"usage: minimind {name}" in done.stdout
    assert " torch" not in done.stderr
