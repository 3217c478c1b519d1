"""DeepSpeed's ZeRO against the plain engine: losses, checkpoints, steps left out, settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.stages.lora import LoRAOptions
from minimind.stages.lora import stage as lora_stage
from minimind.train import zero_settings
from minimind.train.checkpoint import list_checkpoints
from minimind.train.engine import build_engine
from minimind.train.loop import Stage, Trainer
from minimind.train.parallel import Parallel, setup
from minimind.train.preference import Preference
from minimind.train.start import identity
from minimind.train.zero_settings import deepspeed_settings, zero_stage

from .conftest import PRETRAIN, SFT, SIZE, metrics, run, write_jsonl
from .test_parallel import alone, assert_same, train  # noqa: F401  a fixture

pytest.importorskip("deepspeed")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch) -> None:
    """What DeepSpeed's engine sets ends with the test: other libraries take it for a launcher's."""
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture(scope="session")
def zero_in_this_process():
    """DeepSpeed keeps the process group that it was started in, so one serves all tests."""
    parallel = setup("cpu", "float32", zero_stage=1)
    yield parallel
    parallel.close()


@pytest.fixture(params=[1, 2, 3])
def zero(request, zero_in_this_process) -> Parallel:
    return replace(zero_in_this_process, zero_stage=request.param)


@pytest.fixture
def zero_3(zero_in_this_process) -> Parallel:
    return replace(zero_in_this_process, zero_stage=3)


def run_with(parallel: Parallel, options, stage: Stage = PRETRAIN) -> Trainer:
    trainer = Trainer(stage, options, parallel)
    trainer.run()
    return trainer


def share_that_differs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Not quite none: where a gradient is next to nothing, AdamW makes a step of its last bit."""
    differ = [(t.float() - theirs[n].float()).abs() > 1e-4 for n, t in ours.items()]
    return torch.cat([where.flatten() for where in differ]).float().mean().item()


# ---- Several processes ----


def deepspeed(processes: int) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = [f"--num_gpus={processes}", f"--master_port={port}", "--hostfile=none"]
    return ["-m", "deepspeed.launcher.runner", *flags]


def only(step: int, out_dir: Path, copy: Path) -> Path:
    """A copy of a finished run that has only its checkpoint of `step`."""
    shutil.copytree(out_dir, copy)
    for path in list_checkpoints(copy / "runs" / "pretrain_64" / "checkpoints"):
        if path.name != f"step_{step:08d}":
            path.with_suffix(".sha256").unlink()
    return copy


def test_the_same_training_whatever_is_split_and_a_checkpoint_of_any_way_goes_on_in_any_other(
    options,
    alone,  # noqa: F811
    tmp_path,
):
    """ZeRO-2 on 2, by DeepSpeed's launcher → one process → 2 with copies → ZeRO-3 on 2.

    Of a step's 12 rows a process takes 4 at once, so in each second pass one of the two has none.
    """
    given = replace(options, max_steps=20, save_interval=5, optimizer="adamw", keep_last=4)
    keep = "--keep_last=4"
    first = tmp_path / "zero 2"
    assert_same(alone, train(given, first, 2, keep, launcher=deepspeed), first)

    second = only(5, first, tmp_path / "one")
    again = replace(given, out_dir=second, batch_size=12, accumulation_steps=1, epochs=9, from_resume=True)
    assert_same(alone, metrics(run(again)), second)

    third = only(10, second, tmp_path / "ddp")
    assert_same(alone, train(given, third, 2, keep, "--from_resume=1"), third)

    fourth = only(15, third, tmp_path / "zero 3")
    assert_same(alone, train(given, fourth, 2, keep, "--from_resume=1", "--zero_stage=3"), fourth)
    written = torch.load(fourth / "pretrain_64.pth")
    assert {name: t.dtype for name, t in written.items()} == {
        name: t.dtype for name, t in torch.load(alone.weights_path).items()
    }


# ---- One process ----


def test_one_process_with_offload_and_a_settings_file_and_back(options, zero, tmp_path):
    file = tmp_path / "ds.json"
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "train_batch_size": "auto"}
    file.write_text(json.dumps(offload))
    given = replace(options, optimizer="adamw", save_interval=3)
    plain = run(given)
    split = run_with(zero, replace(given, out_dir=tmp_path / "zero", deepspeed_config=file))
    assert metrics(split) == pytest.approx(metrics(plain), rel=1e-5)
    assert metrics(split, "eval_loss") == pytest.approx(metrics(plain, "eval_loss"), rel=1e-5)
    # A sharded checkpoint, and one of a single process.
    for out_dir in (tmp_path / "zero", options.out_dir):
        copy = only(6, out_dir, tmp_path / f"again {out_dir.name}")
        again = replace(given, out_dir=copy, from_resume=True)
        assert metrics(run_with(zero, again)) == pytest.approx(metrics(plain), rel=1e-5)


def test_other_stages_and_experts_with_split_weights(options, sft_options, zero_3, tmp_path):
    """Mixtures, frozen weights, and scores of the starting weights."""
    questions = [{"role": "user", "content": f"{n}后面是几？"} for n in range(40)]
    answers = [[{"role": "assistant", "content": text} for text in (f"{n + 1}", f"烦{n}")] for n in range(40)]
    records = [{"chosen": [q, a[0]], "rejected": [q, a[1]]} for q, a in zip(questions, answers, strict=True)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    mixture = {"use_moe": True, "optimizer": "adamw", "max_steps": 4, "epochs": 9}
    pretrain = replace(options, **mixture)
    sft = replace(sft_options, **mixture)
    shared = {f.name for f in dataclasses.fields(type(options))}
    lora = LoRAOptions(**{n: v for n, v in vars(sft).items() if n in shared})
    dpo = replace(pretrain, data_path=pairs, max_seq_len=128, out_dir=options.out_dir)
    stages = [
        (PRETRAIN, pretrain),
        (SFT, sft),
        (lora_stage(lora), lora),
        (Stage("rlhf", "preference", ("full_sft",), Preference(0.1)), dpo),
    ]
    out_dir = tmp_path / "zero"
    out_dir.mkdir()
    for stage, given in stages:
        for start in options.out_dir.glob("*.pth"):  # both start from the same weights, to the last bit
            shutil.copy(start, out_dir)
        plain = run(given, stage)
        split = run_with(zero_3, replace(given, out_dir=out_dir), stage)
        assert metrics(split) == pytest.approx(metrics(plain), rel=1e-5)
        assert metrics(split, "eval_loss") == pytest.approx(metrics(plain, "eval_loss"), rel=1e-5)
        ours, theirs = (torch.load(t.weights_path) for t in (plain, split))
        assert list(ours) == list(theirs)
        # An adapter's A has hardly a gradient while its B is still near zero.
        assert share_that_differs(ours, theirs) < (0.03 if given is lora else 1e-3)


def step_engine(engine, batches, leave_out=()) -> list[float]:
    """A step for each batch, with those in `leave_out` left out; returns the norms."""
    norms = []
    for i, batch in enumerate(batches):
        with engine.accumulate(more_to_come=False), engine.parallel.autocast():
            logits = engine.trained(batch).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            engine.backward(loss * (torch.inf if i in leave_out else 1.0))
        norms.append(engine.clip().item())
        engine.skip() if i in leave_out else engine.step(1.0)
    return norms


def small_model(options) -> tuple[MiniMind, list[torch.Tensor]]:
    from minimind.config import model_config

    torch.manual_seed(0)
    model = MiniMind(model_config(None, SIZE["hidden_size"], 2, False, 300))
    return model, list(torch.randint(0, 300, (4, 2, 16)))


def test_a_step_left_out_changes_nothing(options, zero):
    given = replace(options, optimizer="adamw")
    states = []
    for parallel in (Parallel(torch.device("cpu"), torch.float32), zero):
        model, batches = small_model(options)
        engine = build_engine(model, given, parallel)
        with engine.accumulate(more_to_come=True):  # and what is discarded before a step's end
            engine.backward(engine.trained(batches[0]).logits.float().sum())
        engine.discard()
        norms = step_engine(engine, batches, leave_out={1})
        assert not torch.tensor(norms[1]).isfinite()
        states.append((norms[0], norms[2:], engine.state_dict()))
    (ours_first, ours_norms, ours), (first, norms, theirs) = states
    assert first == pytest.approx(ours_first, rel=1e-4)
    assert norms == pytest.approx(ours_norms, rel=1e-4)
    for name, weight in ours["model"].items():
        assert torch.allclose(weight, theirs["model"][name], atol=1e-5)
    for name, state in ours["optimizers"]["state"].items():
        for key, value in state.items():
            assert torch.allclose(value, theirs["optimizers"]["state"][name][key], atol=1e-5)
    ours, theirs = ours["optimizers"]["param_groups"], theirs["optimizers"]["param_groups"]
    assert theirs == ours


def test_fp16_scales_its_losses_as_without_deepspeed(options, zero):
    given, norms, scales, weights = replace(options, optimizer="adamw"), [], [], []
    for parallel in (Parallel(torch.device("cpu"), torch.float16), replace(zero, dtype=torch.float16)):
        model, batches = small_model(options)
        engine = build_engine(model, given, parallel)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # far too large at first
        norms.append(step_engine(engine, batches[:2])[:1])
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        norms[-1] += step_engine(engine, batches)
        scales.append(engine.scaler.get_scale())
        weights.append(engine.whole_weights())
    assert not torch.tensor([norms[0][0], norms[1][0]]).isfinite().any()
    assert norms[1][1:] == pytest.approx(norms[0][1:], rel=1e-3)
    assert scales[0] == scales[1]
    # Fp16 products round as the processor sums them up; one with AVX512_FP16 came to 1.01e-3.
    assert share_that_differs(*weights) < 2e-3


# ---- Settings ----


def test_what_asks_for_zero(options, tmp_path, monkeypatch):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert zero_stage(options) == 0
    assert zero_stage(replace(options, parallel="zero")) == 2
    assert zero_stage(replace(options, zero_stage=1)) == 1
    assert zero_stage(replace(options, deepspeed_config=file)) == 3
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert zero_stage(options) == 2
    assert zero_stage(replace(options, parallel="ddp")) == 0
    with pytest.raises(UserError, match=r"--zero_stage are? ?.*for --parallel zero, not fsdp"):
        zero_stage(replace(options, parallel="fsdp", zero_stage=1))
    with pytest.raises(UserError, match="stage is 3, but this run has 1"):
        zero_stage(replace(options, deepspeed_config=file, zero_stage=1))
    monkeypatch.setattr(zero_settings, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '/.*\[deepspeed\]'"):
        zero_stage(options)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 9}, "train_batch_size is 9, but this run has 8; change --global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "this run has 4; change --batch_size"),
        ({"gradient_accumulation_steps": 8}, "this run has 2; change --accumulation_steps"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but this run has 1.0; change --grad_clip"),
        ({"optimizer": {"type": "Adam"}}, "take out 'optimizer'; --optimizer, --learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "take out 'scheduler'"),
        (
            {"bf16": {"enabled": True}},
            "bf16 is enabled, but this run computes in float32; give --dtype bfloat16",
        ),
        ([], "must be an object"),
        (None, "is no JSON"),
    ],
)
def test_settings_that_contradict_the_flags_are_refused(options, tmp_path, settings, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings) if settings is not None else "{")
    with pytest.raises(UserError, match=message):
        deepspeed_settings(
            replace(options, deepspeed_config=file),
            Parallel(torch.device("cpu"), torch.float32, zero_stage=2),
        )


def test_the_users_settings_go_over_ours(options, tmp_path):
    file = tmp_path / "ds.json"
    theirs = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(theirs))
    parallel = Parallel(torch.device("cpu"), torch.float32, zero_stage=2)
    settings = deepspeed_settings(replace(options, deepspeed_config=file), parallel)
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True, "compute_grad_norm": True}
    assert settings["gradient_accumulation_steps"] == 1  # the loop draws the line between steps
    assert "bf16" not in settings


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": "much"}},
            "these settings: .*reduce_bucket_size",
        ),
        ({"checkpoint": {"tag_validation": "x"}}, "these settings: .*tag_validation"),
        (
            {
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": True,
            },
            "these settings: You are using ZeRO-Offload",
        ),
        ({"aio": 5}, "these settings: 'int' object"),
        ({"zero_optimization": {"offload_optimizer": 5}}, "these settings: .*offload_optimizer"),
        ({"zero_optimization": 3}, r"ds\.json: zero_optimization must be an object"),
        ({"bf16": True}, r"ds\.json: bf16 must be an object"),
    ],
)
def test_what_deepspeed_refuses_is_one_sentence(options, zero_3, tmp_path, settings, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        Trainer(PRETRAIN, replace(options, deepspeed_config=file), zero_3)


@pytest.mark.parametrize("broken", ["import_deepspeed", "deepspeed_settings"])
def test_a_bug_of_ours_is_not_called_deepspeeds(options, zero_3, tmp_path, monkeypatch, broken):
    def bug(*_):
        raise TypeError("ours")

    file = tmp_path / "ds.json"
    file.write_text("{}")
    monkeypatch.setattr(f"minimind.train.zero.{broken}", bug)
    with pytest.raises(TypeError, match="ours"):
        Trainer(PRETRAIN, replace(options, deepspeed_config=file), zero_3)


def test_muon_is_the_optimizer_but_under_zero(options, zero_3):
    assert (
        identity(Trainer(PRETRAIN, options, Parallel(torch.device("cpu"), torch.float32)))["optimizer"]
        == "muon"
    )
    assert identity(Trainer(PRETRAIN, options, zero_3))["optimizer"] == "adamw"
    with pytest.raises(UserError, match="--optimizer muon needs whole matrices"):
        Trainer(PRETRAIN, replace(options, optimizer="muon"), zero_3)


def test_split_weights_are_not_compiled(options, zero_3):
    with pytest.raises(UserError, match="--compile 1 does not work with --zero_stage 3"):
        Trainer(PRETRAIN, replace(options, compile="1"), zero_3)
