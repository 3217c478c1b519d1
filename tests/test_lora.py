"""Adapters against real PEFT, what training them leaves alone, and which files are taken."""

from __future__ import annotations

import json
import re
import signal
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from test_model import SHAPES, in_transformers, random_model
from train.conftest import metrics, run, write_jsonl
from train.test_loop import stop_after

from minimind.config import ModelConfig
from minimind.errors import UserError
from minimind.lora import BASE, TARGETS, attach, detach, load_adapters, lora_state, merge, save_lora
from minimind.paths import DATASET_DIR
from minimind.stages.lora import LoRAOptions, main, stage
from minimind.tokenizer import Tokenizer
from minimind.train.checkpoint import list_checkpoints
from minimind.weights import load_model, save_weights

ATTENTION = TARGETS[:4]
MAKE = "python trainer/train_lora.py"


def randomise(model, seed: int = 1) -> None:
    """Adapters as after training: B is no longer zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(parameter, std=0.1)


def adapted(shape: str = "dense", rank: int = 4, targets=TARGETS, seed: int = 1):
    model = random_model(SHAPES[shape])
    attach(model, rank, targets)
    randomise(model, seed)
    return model.eval()


def some_ids() -> torch.Tensor:
    return torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shape", "targets"), [("dense", TARGETS), ("moe", ATTENTION)])
def test_forward_and_gradients_equal_peft(shape, targets, tmp_path):
    ours = adapted(shape, targets=targets)
    state = lora_state(ours.state_dict())
    theirs = in_transformers(random_model(SHAPES[shape]), tmp_path)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=4, target_modules=list(targets))).eval()
    their_parameters = {
        re.sub(r"base_model\.model\.(.+)\.lora_([AB])\.default", r"\1.lora.\2", name): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(their_parameters) == set(state)
    with torch.no_grad():
        for name, parameter in their_parameters.items():
            parameter.copy_(state[name])

    ids = some_ids()
    our_logits, their_logits = ours(ids).logits, theirs(ids).logits
    assert (our_logits - random_model(SHAPES[shape])(ids).logits).abs().max() > 0.1  # adapters matter
    assert (our_logits - their_logits).abs().max() <= 1e-5
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (".lora." in name)
        if parameter.requires_grad:
            assert (parameter.grad - their_parameters[name].grad).abs().max() <= 1e-5, name


@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_attach_starts_from_the_model_and_detach_gives_it_back(shape):
    model = random_model(SHAPES[shape]).eval()
    before = dict(model.named_parameters(remove_duplicate=False))
    expected = model(some_ids()).logits
    attach(model)
    assert torch.equal(model(some_ids()).logits, expected)
    assert all(
        dict(model.named_parameters())[name] is p for name, p in before.items() if "lm_head" not in name
    )
    randomise(model)
    detach(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and after[name].requires_grad for name in before)
    assert torch.equal(model(some_ids()).logits, expected)


def test_experts_are_adapted_and_the_router_is_not():
    places = {name.split(".lora.")[0] for name in lora_state(adapted("moe").state_dict())}
    assert "model.layers.1.mlp.experts.3.up_proj" in places
    assert "model.layers.0.mlp.shared_experts.0.down_proj" in places
    assert len(places) == 2 * (4 + 5 * 3)  # layers, each with attention, four experts and a shared one
    assert not [name for name in places if name.endswith("mlp.gate") or "lm_head" in name]


@pytest.mark.parametrize("shape", ["dense", "moe", "two_shared"])
def test_merged_logits_are_those_of_the_adapters(shape):
    model = adapted(shape)
    with torch.no_grad():
        expected = model(some_ids()).logits
        merge(model)
        assert not lora_state(model.state_dict())
        assert (model(some_ids()).logits - expected).abs().max() <= 1e-5


def test_precision_under_autocast():
    model = adapted("moe").train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(some_ids())
    output.logits.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert output.logits.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_adapters_of_minimind2_load_as_they_are(tmp_path):
    """Square projections only, rank 16, in fp16: 64 × 64 here are queries and outputs."""
    torch.manual_seed(0)
    state = {}
    for layer in range(3):
        for part in ("q_proj", "o_proj"):
            place = f"model.layers.{layer}.self_attn.{part}.lora"
            state[f"{place}.A.weight"] = torch.randn(16, 64).half() / 10
            state[f"{place}.B.weight"] = torch.randn(64, 16).half() / 10
    torch.save(state, tmp_path / "lora_identity_64.pth")
    model, expected = (random_model(SHAPES["dense"]).eval() for _ in "12")
    load_adapters(model, [tmp_path / "lora_identity_64.pth"], MAKE)
    for name, tensor in expected.named_parameters():
        if a := [state[k].float() for k in state if k.startswith(name.removesuffix(".weight") + ".lora.")]:
            tensor.data += a[1] @ a[0]
    assert (model(some_ids()).logits - expected(some_ids()).logits).abs().max() <= 1e-5


def test_several_adapters_add_up(tmp_path):
    """Of different ranks, and on different projections."""
    paths, deltas = [], []
    base = random_model(SHAPES["dense"]).state_dict()
    for i, (rank, targets) in enumerate([(2, TARGETS), (5, ("q_proj", "down_proj"))]):
        single = adapted(rank=rank, targets=targets, seed=i)
        paths.append(tmp_path / f"{i}_64.pth")
        save_lora(single.state_dict(), paths[-1])
        merge(single)
        deltas.append({name: tensor - base[name] for name, tensor in single.state_dict().items()})
    both = random_model(SHAPES["dense"]).eval()
    load_adapters(both, paths, MAKE)
    assert both.model.layers[0].self_attn.q_proj.lora.A.weight.shape == (7, 64)
    assert both.model.layers[0].self_attn.k_proj.lora.A.weight.shape == (2, 64)
    merge(both)
    for name, tensor in both.state_dict().items():
        torch.testing.assert_close(tensor, base[name] + deltas[0][name] + deltas[1][name])


def noted(model, path: Path, capsys) -> str:
    load_adapters(model, [path], MAKE)
    return capsys.readouterr().err


def test_other_base_weights_are_noted(tmp_path, capsys):
    """The weights of the training, however rounded, are the same; those of another training are not."""
    path = tmp_path / "a_64.pth"
    save_lora(adapted().state_dict(), path)
    assert noted(random_model(SHAPES["dense"]), path, capsys) == ""
    for dtype in (torch.float16, torch.bfloat16):
        assert noted(random_model(SHAPES["dense"]).to(dtype).float(), path, capsys) == ""
    trained_on = random_model(SHAPES["dense"])
    with torch.no_grad():
        for parameter in trained_on.parameters():
            parameter += 0.03 * parameter.std() * torch.randn_like(parameter)
    for other in (trained_on, random_model(SHAPES["dense"], 1)):
        said = noted(other, path, capsys)
        assert said.startswith(f"note: {path} was trained beside other weights than it is added to here")
        assert said.count("\n") == 1
        assert f"{MAKE} --lora_name a" in said


def test_the_base_is_told_apart_from_the_adapters(tmp_path):
    """It is no entry of the file: published readers, which go through the entries, see adapters alone."""
    save_lora(adapted().state_dict(), tmp_path / "a_64.pth")
    state = torch.load(tmp_path / "a_64.pth", weights_only=True)
    assert set(state) == set(lora_state(adapted().state_dict()))
    module = adapted(seed=1)
    assert not module.load_state_dict(state, strict=False).unexpected_keys


@pytest.mark.parametrize(
    "base", [None, 3, torch.zeros(2), torch.ones(2) > 0, torch.full((5,), float("nan")), "x"]
)
def test_what_is_no_record_of_the_base_does_no_harm(tmp_path, base):
    state = OrderedDict(lora_state(adapted().state_dict()))
    vars(state)["_metadata"] = {BASE: base} if base is not None else "x"
    torch.save(state, tmp_path / "a_64.pth")
    load_adapters(random_model(SHAPES["dense"]), [tmp_path / "a_64.pth"], MAKE)


# ---- Files that do not fit ----

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora.A.weight": torch.zeros(4, 32)}, rf"{Q}\.lora\.A\.weight of size \[4, 32\].*\[4, 64\]"),
        ({f"{Q}.lora.B.weight": torch.zeros(64, 3)}, rf"{Q}\.lora\.B\.weight of size \[64, 3\].*\[64, 4\]"),
        ({f"{Q}.lora.A.weight": torch.zeros(())}, r"of size \[\], but"),
        ({f"{Q}.lora.A.weight": torch.zeros(0, 64)}, r"of size \[0, 64\]"),
        ({f"{Q}.lora.B.weight": None}, f"only one half of the adapter of {Q};"),
        ({f"{Q}.lora.B.weight": torch.full((64, 4), float("nan"))}, "not numbers: its training diverged"),
        ({"model.layers.9.mlp.up_proj.lora.A.weight": torch.zeros(4, 64)}, r"layers\.9.*\(64, 3 layers\)"),
        ({"lm_head.lora.A.weight": torch.zeros(4, 64)}, "adapts lm_head, no projection of this model"),
        ({"model.norm.weight": torch.zeros(64)}, r"no adapter file: it holds model\.norm\.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_untouched(tmp_path, change, message):
    path = tmp_path / "bad_64.pth"
    state = lora_state(adapted().state_dict()) | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    model = random_model(SHAPES["dense"])
    with pytest.raises(UserError, match=message) as raised:
        load_adapters(model, [path], MAKE)
    assert str(path) in str(raised.value)
    assert "train it again" in str(raised.value) or MAKE in str(raised.value)
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_state(model.state_dict())


def test_missing_empty_and_damaged_files(tmp_path):
    model = random_model(SHAPES["dense"])
    for name in ("lora_identity_64.pth", "lora_medical_64.pth", "wide_512.pth", "experts_64_moe.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"there are: lora_identity, lora_medical\); make one with: {MAKE}"):
        load_adapters(model, [tmp_path / "other_64.pth"], MAKE)
    with pytest.raises(UserError, match="damaged"):
        load_adapters(model, [tmp_path / "lora_identity_64.pth"], MAKE)
    torch.save({}, tmp_path / "lora_medical_64.pth")
    with pytest.raises(UserError, match="holds no adapters"):
        load_adapters(model, [tmp_path / "lora_medical_64.pth"], MAKE)


def test_an_adapter_of_another_tokenizer_is_refused(tmp_path):
    save_lora(adapted().state_dict(), tmp_path / "a_64.pth")
    run_file = tmp_path / "runs" / "a_64" / "run.json"
    run_file.parent.mkdir(parents=True)
    run_file.write_text(json.dumps({"tokenizer_fingerprint": "another"}))
    with pytest.raises(UserError, match="another tokenizer"):
        load_adapters(random_model(SHAPES["dense"]), [tmp_path / "a_64.pth"], MAKE, Tokenizer.load())


# ---- Training ----


@pytest.fixture
def options(tmp_path) -> LoRAOptions:
    """Seven steps beside a random chat model, dense or not."""
    records = [
        {
            "conversations": [
                {"role": "user", "content": f"{a}加{b}"},
                {"role": "assistant", "content": "三" * a},
            ]
        }
        for a in range(1, 10)
        for b in range(4)
    ]
    for experts in (0, 4):
        config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_experts=experts)
        save_weights(random_model(config), tmp_path / "out" / f"full_sft_{config.name}.pth")
    return LoRAOptions(
        data_path=write_jsonl(tmp_path / "data.jsonl", records),
        out_dir=tmp_path / "out",
        lora_name="threes",
        lora_rank=4,
        hidden_size=64,
        num_hidden_layers=2,
        max_seq_len=64,
        batch_size=2,
        learning_rate=1e-2,
        max_steps=7,
        epochs=9,
        dtype="float32",
        device="cpu",
        compile="0",
        log_interval=1000,
    )


@pytest.mark.parametrize("use_moe", [False, True])
def test_training_changes_the_adapters_alone(options, use_moe, capsys):
    options = replace(options, use_moe=use_moe)
    trainer = run(options, stage(options))
    losses = metrics(trainer)
    assert losses[-1] < losses[0] - 0.3
    base = load_model(trainer.started_from, "").state_dict()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    trained = {id(p) for o in trainer.engine.optimizers for group in o.param_groups for p in group["params"]}
    adapters = {id(p) for name, p in trainer.model.named_parameters() if ".lora." in name}
    assert trained == adapters
    assert {id(p) for o in trainer.engine.optimizers for p in o.state} == adapters

    size = "64_moe" if use_moe else "64"
    assert trainer.weights_path == options.out_dir / "lora" / f"threes_{size}.pth"
    assert trainer.run_dir == options.out_dir / "lora" / "runs" / f"threes_{size}"
    saved = torch.load(trainer.weights_path, weights_only=True)
    assert saved.keys() == lora_state(trainer.model.state_dict()).keys()
    again = load_model(trainer.started_from, "")
    capsys.readouterr()
    load_adapters(again, [trainer.weights_path], MAKE, trainer.tokenizer)
    assert capsys.readouterr().err == ""
    assert BASE in torch.load(trainer.weights_path)._metadata
    assert all(torch.equal(after[name], tensor) for name, tensor in again.state_dict().items())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(options, tmp_path, monkeypatch):
    options = replace(options, dtype="bfloat16")
    whole = run(options, stage(options))
    options = replace(options, lora_name="stopped")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert run(options, stage(options)).exit_code == 128 + signal.SIGTERM
    (options.out_dir / "full_sft_64.pth").unlink()  # the checkpoint has all of the model
    resumed = run(replace(options, from_resume=True), stage(options))
    assert metrics(resumed) == metrics(whole)
    assert resumed.weights_path.read_bytes() == whole.weights_path.read_bytes()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    assert len(list_checkpoints(resumed.run_dir / "checkpoints")) == 2


def test_options(options):
    assert LoRAOptions().lora_targets.split(",") == list(TARGETS)
    assert LoRAOptions(lora_name="lora_identity").data_path == DATASET_DIR / "lora_identity.jsonl"
    for name in ("", "../x", "a\\b", "..", "名" * 60):
        with pytest.raises(UserError, match="--lora_name is"):
            LoRAOptions(lora_name=name)
    for changes, message in (
        ({"lora_targets": "q_proj,gate"}, "--lora_targets names 'gate'; choose from q_proj,"),
        ({"lora_targets": ""}, "--lora_targets names ''; choose"),
        ({"from_weight": "rlhf"}, r"rlhf_64\.pth"),
    ):
        wrong = replace(options, **changes)
        with pytest.raises(UserError, match=message):
            run(wrong, stage(wrong))
    for rank in (0, 10**10):
        with pytest.raises(UserError, match=f"--lora_rank is {rank}; it must be 1 to 1024"):
            replace(options, lora_rank=rank)
    with pytest.raises(UserError, match="an adapter needs trained weights beside it"):
        main(["--from_weight", "none"])


def test_the_command(options):
    names = ("data_path", "out_dir", "hidden_size", "num_hidden_layers", "max_seq_len", "dtype", "device")
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    few = [
        "--lora_name=few",
        "--lora_targets=v_proj,up_proj",
        "--lora_rank=2",
        "--max_steps=1",
        "--compile=0",
    ]
    assert main([*flags, *few]) == 0
    saved = torch.load(options.out_dir / "lora" / "few_64.pth", weights_only=True)
    assert {name.split(".")[-4] for name in saved} == {"v_proj", "up_proj"}
    assert saved["model.layers.1.self_attn.v_proj.lora.A.weight"].shape == (2, 64)
