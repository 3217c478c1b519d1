"""The loop's parts on their own: schedule, optimizers, flags, evaluation, file names."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minimind.config import ModelConfig
from minimind.data.batches import PackedDataset
from minimind.data.prepare import prepare
from minimind.evaluate.bits_per_byte import bits_per_byte
from minimind.flags import REQUIRED, flag, parse_flags
from minimind.model import MiniMind
from minimind.paths import DATASET_DIR, OUT_DIR, ROOT
from minimind.stages.pretrain import PretrainOptions
from minimind.stages.sft import SFTOptions
from minimind.tokenizer import Tokenizer
from minimind.train import losses
from minimind.train.objective import Objective
from minimind.train.optim import build_optimizers, learning_rate_scale
from minimind.train.parallel import setup


def test_schedule_warms_up_and_never_exceeds_the_rate():
    scales = [learning_rate_scale(step, 1000, 100) for step in range(1000)]
    assert scales[0] == pytest.approx(1 / 101)
    assert all(a < b for a, b in pairwise(scales[:101]))
    assert max(scales) == scales[100] == 1.0
    assert all(a > b for a, b in pairwise(scales[100:]))
    assert scales[-1] == pytest.approx(0.1)
    assert learning_rate_scale(0, 1, 0) == 1.0


def test_an_objective_has_a_loss():
    class Lossless(Objective):
        pass

    with pytest.raises(TypeError, match=r"abstract method '?loss"):
        Lossless()


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("experts", [0, 4])
def test_each_parameter_has_one_optimizer_and_only_matrices_decay(name, experts):
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1, num_experts=experts))
    optimizers = build_optimizers(model, name, 1e-3, 0.1, embedding_rate=3.0)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    if name == "muon":
        muon = set(optimizers[0].param_groups[0]["params"])
        assert model.model.layers[0].self_attn.q_proj.weight in muon
        assert model.model.embed_tokens.weight not in muon
    for group in groups:
        faster = name == "muon" and any(p is model.model.embed_tokens.weight for p in group["params"])
        assert group["peak_lr"] == pytest.approx(3e-3 if faster else 1e-3)


def test_frozen_parameters_get_no_optimizer():
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1))
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizers = build_optimizers(model, "adamw", 1e-3, 0.1)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert all(p is not model.model.embed_tokens.weight for p in held)


def test_bits_per_byte_is_the_definition(texts):
    tokenizer = Tokenizer.load()
    store = prepare(texts, "pretrain", tokenizer, progress=False)
    data = PackedDataset(store, 64, seed=1, pad_id=0, eos_id=2)
    torch.manual_seed(0)
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1))
    score = bits_per_byte(model, data, tokenizer, setup("cpu", "float32"), batch_size=5)
    nats = num_bytes = tokens = 0
    for i in range(store.num_documents):
        ids = torch.from_numpy(store.document(i).astype("int64"))
        for start in range(0, len(ids) - 1, 64):
            piece = ids[start : start + 65]
            logits = model(piece[None, :-1]).logits[0]
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            tokens += len(piece) - 1
            num_bytes += sum(len(tokenizer.token_bytes[t]) for t in piece[1:])
    assert score.loss == pytest.approx(nats / tokens, rel=1e-2)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-2)


@dataclass(frozen=True)
class Example:
    use_moe: bool | None = flag(None, "a switch")
    size: int = flag(3, "a number, 50% of something")
    mode: str = flag("a", "a choice", choices=("a", "b"))
    names: tuple[str, ...] = flag(("a",), "several choices", choices=("a", "b"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--use_moe"], True),
        (["--use_moe", "1"], True),
        (["--use_moe", "True"], True),
        (["--use_moe", "yes"], True),
        (["--use_moe", "0"], False),
        (["--use_moe", "False"], False),
        (["--use_moe=no"], False),
    ],
)
def test_a_switch_means_what_it_says(argv, expected):
    assert parse_flags(Example, argv, "").use_moe is expected


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--use_moe", "maybe"], "'maybe' is neither yes nor no: write 1 or 0; --help lists the flags"),
        (["--size", "x"], "--size: invalid int value: 'x'"),
        (["--mode", "c"], "--mode: invalid choice: 'c'"),
        (["--siz", "3"], "unrecognized arguments: --siz 3; did you mean --size?"),
        (["-size", "3"], "unrecognized arguments: -size 3; did you mean --size?"),
        (["--mode", "a", "--colour=red"], "unrecognized arguments: --colour=red; --help lists the flags"),
        (["--names", "b", "c"], "--names: invalid choice: 'c'"),
        (["--names"], "--names: expected at least one argument"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(argv, hint, capsys):
    with pytest.raises(SystemExit) as raised:
        parse_flags(Example, argv, "")
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line
    assert hint in line


@dataclass(frozen=True)
class Named:
    file: Path = flag(REQUIRED, "a file", positional=True)
    others: tuple[str, ...] = flag(("a", "b"), "more", positional=True)
    size: int = flag(3, "a number")


def test_arguments_without_a_name(capsys):
    assert parse_flags(Named, ["x"], "") == Named(Path("x"), ("a", "b"), 3)
    assert parse_flags(Named, ["--size", "4", "x", "c", "d"], "") == Named(Path("x"), ["c", "d"], 4)
    with pytest.raises(SystemExit):
        parse_flags(Named, ["--size", "4"], "")
    assert "arguments are required: FILE" in capsys.readouterr().err


def test_defaults_are_paths_of_the_repository():
    options = parse_flags(PretrainOptions, [], "")
    assert options.data_path == DATASET_DIR / "pretrain_hq.jsonl"
    assert parse_flags(SFTOptions, [], "").data_path == DATASET_DIR / "sft_mini_512.jsonl"
    assert options.out_dir == OUT_DIR == ROOT / "out"
    assert options.data_path.is_absolute()


SEED_FLAGS = (
    "out_dir",
    "epochs",
    "batch_size",
    "learning_rate",
    "device",
    "dtype",
    "use_wandb",
    "wandb_project",
    "num_workers",
    "accumulation_steps",
    "grad_clip",
    "warmup_iters",
    "log_interval",
    "save_interval",
    "local_rank",
    "hidden_size",
    "num_hidden_layers",
    "max_seq_len",
    "use_moe",
    "data_path",
    "preset",
    "from_resume",
)


@pytest.mark.parametrize("script", ["train_pretrain", "train_full_sft", "train_distill_reason"])
def test_scripts_know_the_seeds_flags_and_answer_help_at_once(script, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainer" / f"{script}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert time.monotonic() - began < 5  # no PyTorch: a tenth of a second on an idle machine
    assert all(f"--{name} " in done.stdout for name in SEED_FLAGS)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "trainer"])
def test_missing_data_is_one_sentence(folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "trainer/train_pretrain.py",
            "--data_path=nowhere.jsonl",
            f"--out_dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no data at nowhere.jsonl")
    assert "Traceback" not in done.stderr


def test_targets_are_filled_up_to_few_lengths():
    lengths = [len(losses.filled_up(torch.arange(n))) for n in range(4097)]
    assert all(n <= length <= n * 17 / 16 for n, length in enumerate(lengths))
    assert len({length for length in lengths if 1024 <= length <= 4096}) == 33
    assert losses.filled_up(torch.arange(5, 38)).tolist() == [*range(5, 38), 37]


def test_filling_up_changes_no_loss_and_no_gradient(texts, monkeypatch):
    store = prepare(texts, "pretrain", Tokenizer.load())
    batch = PackedDataset(store, 61, seed=0, pad_id=0, eos_id=2).batch(0, 0, 3)
    torch.manual_seed(0)
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=1))

    def loss_and_gradients():
        targets = losses.at_targets(model, batch)
        assert targets.logits.shape == (batch.num_target_tokens, 6400)
        loss = (targets.nll * targets.weights).sum()
        return len(targets.filled_logits), [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    more, found = loss_and_gradients()
    monkeypatch.setattr(losses, "filled_up", lambda where: where)
    fewer, expected = loss_and_gradients()
    assert more > fewer == batch.num_target_tokens
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
