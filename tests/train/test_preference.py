"""DPO against its formula, TRL and whole runs."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minimind.config import ModelConfig
from minimind.data.batches import PairDataset
from minimind.data.prepare import prepare
from minimind.errors import UserError
from minimind.export.huggingface import transformers_config, transformers_state_dict
from minimind.model import MiniMind, ModelOutput
from minimind.paths import ROOT
from minimind.stages.dpo import DPOOptions
from minimind.tokenizer import Tokenizer
from minimind.train import loop
from minimind.train.loop import Stage
from minimind.train.losses import at_targets
from minimind.train.parallel import setup
from minimind.train.preference import Preference, dpo_loss

from .conftest import SIZE, metrics, run, weights, write_jsonl

DPO = Stage("rlhf", data_kind="preference", starts_from=("full_sft",), objective=Preference(0.1))


def write_pairs(path: Path, numbers: range) -> Path:
    """Questions with a polite and a rude answer, of many lengths."""

    def messages(n: int, answer: str) -> list[dict]:
        return [{"role": "user", "content": f"{n}后面是几？"}, {"role": "assistant", "content": answer}]

    records = [
        {
            "chosen": messages(n, f"您好，是{n + 1}" + "。" * (n % 5)),
            "rejected": messages(n, f"烦！{n}" * (n % 3 + 1)),
        }
        for n in numbers
    ]
    return write_jsonl(path, records)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", range(41))


@pytest.fixture
def dpo_options(pairs, options, tmp_path) -> DPOOptions:
    """A run of 4 steps from random weights, with pairs to evaluate on."""
    given = vars(options) | {"max_seq_len": 128, "batch_size": 2, "accumulation_steps": 2, "max_steps": 4}
    held_out = write_pairs(tmp_path / "held_out.jsonl", range(50, 61))
    return replace(
        DPOOptions(**given), data_path=pairs, eval_path=held_out, from_weight="none", eval_interval=2
    )


@pytest.fixture
def data(pairs) -> PairDataset:
    store = prepare(pairs, "preference", Tokenizer.load(), progress=False)
    return PairDataset(store, 128, seed=1, pad_id=0, eos_id=2)


def random_model(seed: int) -> MiniMind:
    """No branch of it is zero, as those of a new model are."""
    torch.manual_seed(seed)
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def one_at_a_time(model: MiniMind, data: PairDataset) -> torch.Tensor:
    """(pairs, 2) the log-probabilities of all answers, each from a forward pass of its own."""
    store, logps = data.store, []
    for i in range(store.num_documents):
        ids = torch.from_numpy(store.document(i).astype("int64"))
        is_target = torch.from_numpy(store.weights[store.offsets[i] + 1 : store.offsets[i + 1]] > 0)
        log_probabilities = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
        logps.append(log_probabilities.gather(1, ids[1:, None])[is_target].sum())
    return torch.stack(logps).view(-1, 2)


def test_the_loss_is_the_formula():
    torch.manual_seed(0)
    logps, reference = (-200 * torch.rand(2, 100, 2, dtype=torch.float64)).requires_grad_()
    losses, rewards = dpo_loss(logps, reference, 0.1)
    ratios = logps - reference
    probability = 1 / (1 + torch.exp(-0.1 * (ratios[:, 0] - ratios[:, 1])))
    torch.testing.assert_close(losses, -probability.log())
    torch.testing.assert_close(rewards, 0.1 * ratios)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)  # equation under "what does the DPO update do"
    torch.testing.assert_close(gradient[:, 0], -0.1 * (1 - probability))
    torch.testing.assert_close(gradient[:, 1], 0.1 * (1 - probability))


def test_without_a_difference_to_the_reference_the_loss_is_log_2():
    logps = -200 * torch.rand(100, 2)
    losses, rewards = dpo_loss(logps, logps, 0.1)
    assert (losses == torch.tensor(2.0).log()).all()
    assert (rewards == 0).all()


@torch.no_grad()
def test_packed_answers_have_the_log_probabilities_they_have_alone(data):
    model = random_model(0)
    expected = one_at_a_time(model, data)
    batch = data.batch(0, 0, data.num_rows, min_rows=data.num_rows + 2)
    targets = at_targets(model, batch)
    found = Preference(0.1).answer_logps(targets, batch)
    torch.testing.assert_close(found.double(), expected[batch.pairs], atol=0, rtol=1e-5)
    means = Preference(0.1, length_normalised=True).answer_logps(targets, batch)
    torch.testing.assert_close(means, found / batch.sides.bincount().view(-1, 2))


@pytest.mark.parametrize("length_normalised", [False, True])
@torch.no_grad()
def test_scores_on_held_out_pairs_are_their_definitions(data, length_normalised):
    reference_model, model, tokenizer = random_model(0), random_model(1), Tokenizer.load()
    objective, parallel = Preference(0.5, length_normalised), setup("cpu", "float32")
    objective.begin(reference_model, [data], parallel, batch_size=3)
    scores = objective.evaluate(model, data, tokenizer, parallel, 2, None)

    logps, reference = one_at_a_time(model, data), one_at_a_time(reference_model, data)
    targets = data.store.weights.nonzero()[0]
    documents = data.store.offsets.searchsorted(targets, side="right") - 1
    num_bytes = len(tokenizer.decode(data.store.tokens[targets[documents % 2 == 0]]).encode())
    bpb = -logps[:, 0].sum().item() / math.log(2) / num_bytes
    if length_normalised:
        lengths = torch.from_numpy(documents).bincount().view(-1, 2)
        logps, reference = logps / lengths, reference / lengths
    torch.testing.assert_close(data.reference.double(), reference, atol=0, rtol=1e-5)
    rewards = 0.5 * (logps - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "eval_loss": -margins.sigmoid().log().mean().item(),
        "eval_accuracy": (logps[:, 0] > logps[:, 1]).double().mean().item(),
        "eval_reward_accuracy": (margins > 0).double().mean().item(),
        "eval_margin": margins.mean().item(),
        "eval_bpb": bpb,
    }
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < scores["eval_accuracy"] < 1


def in_transformers(model: MiniMind):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = transformers_config(model.config)
    theirs = LlamaForCausalLM(LlamaConfig(**config))
    theirs.load_state_dict(transformers_state_dict(model.state_dict(), model.config), strict=False)
    theirs.tie_weights()
    return theirs


class SameLogits(torch.nn.Module):
    """Float64 logits that both sides can be given: each position's follow from its token alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = {"generator": generator, "dtype": torch.float64}
        self.tokens = torch.nn.Parameter(torch.randn(6400, 8, **shape))
        self.vocabulary = torch.randn(8, 6400, **shape)

    def forward(self, input_ids, *_, logits_at=None, labels=None, **__) -> ModelOutput | SimpleNamespace:
        logits = self.tokens[input_ids] @ self.vocabulary  # (B, T, V)
        if labels is None:
            return ModelOutput(logits.flatten(0, 1)[logits_at], [])
        # As the models in TRL's hands do: log-probabilities of the labels, one position on.
        targets = labels[:, 1:, None]
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0))
        mask = targets != -100
        nothing = torch.zeros_like(log_probs)[..., 0]
        return SimpleNamespace(
            log_probs=(log_probs * mask)[..., 0],
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            label_mask=mask[..., 0],
        )


@pytest.fixture
def trl_trainer(data, tmp_path):
    """TRL's DPO trainer on the pairs of `data`, and its batch of the first four."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    records = [json.loads(line) for line in Path(data.store.meta["source"]).read_text().splitlines()]
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    trainer = trl.DPOTrainer(
        in_transformers(random_model(1)),
        in_transformers(random_model(0)),
        trl.DPOConfig(str(tmp_path), beta=0.5, **options),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(Tokenizer.load().path),
    )
    # What the template writes behind `<|im_end|>` is a target there, but no part of an answer.
    rows = [
        row | {side: row[side][: row[side].index(2) + 1] for side in ("chosen_ids", "rejected_ids")}
        for row in trainer.train_dataset
    ]
    batch = data.batch(0, 1, 2)
    return trainer, batch.pairs, trainer.data_collator([rows[i] for i in batch.pairs])


@pytest.mark.parametrize(("theirs", "length_normalised"), [("sigmoid", False), ("sigmoid_norm", True)])
def test_on_the_same_logits_the_loss_is_trls(data, trl_trainer, theirs, length_normalised):
    trainer, pairs, inputs = trl_trainer
    policy, trainer.ref_model, trainer.loss_types = SameLogits(1), SameLogits(0), [theirs]
    expected = trainer.compute_loss(policy, inputs)
    expected.backward()
    gradient, policy.tokens.grad = policy.tokens.grad, None

    objective = Preference(0.5, length_normalised)
    data.reference = data.reference.double()
    objective.begin(SameLogits(0), [data], setup("cpu", "float32"), batch_size=3)
    ours = objective.loss(policy, data.batch(0, 1, 2), 0.0)
    ours.total.backward()
    assert ours.total.item() / len(pairs) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(policy.tokens.grad / len(pairs), gradient, rtol=1e-6, atol=1e-9)
    logged = {name: trainer._metrics["train"][name][0] for name in ours.metrics}
    if not length_normalised:  # TRL's rewards are sums in either case
        assert {n: v.item() for n, v in ours.metrics.items()} == pytest.approx(logged, rel=1e-6)


def test_loss_rewards_and_gradients_of_a_model_are_those_of_trl(data, trl_trainer):
    trainer, pairs, inputs = trl_trainer
    model, objective = random_model(1), Preference(0.5)
    objective.begin(random_model(0), [data], setup("cpu", "float32"), batch_size=3)
    ours = objective.loss(model, data.batch(0, 1, 2), 0.0)
    ours.total.backward()

    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    # Both sum logits of fp32 models, in another order.
    assert ours.logged.item() / len(pairs) == pytest.approx(theirs.item(), rel=1e-5)
    logged = {name: trainer._metrics["train"][name][0] for name in ours.metrics}
    assert {name: value.item() for name, value in ours.metrics.items()} == pytest.approx(logged, abs=1e-5)
    ours, theirs = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (model, trainer.model))
    torch.testing.assert_close(ours / len(pairs), theirs)


@pytest.mark.parametrize("factor", [1e4, 1e8])
def test_extreme_logits_give_a_finite_loss_and_gradient(data, factor):
    model = random_model(0)
    objective = Preference(0.1)
    objective.begin(random_model(1), [data], setup("cpu", "float32"), batch_size=3)
    model.lm_head.weight.data *= factor
    loss = objective.loss(model, data.batch(0, 0, 4), 0.0)
    loss.total.backward()
    assert loss.logged.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_run_learns_what_is_preferred(dpo_options):
    options = replace(dpo_options, max_steps=None, epochs=4, learning_rate=2e-3)
    trainer = run(options, DPO)
    assert trainer.weights_path.name == "rlhf_64.pth"
    assert metrics(trainer)[0] == pytest.approx(math.log(2), rel=1e-5)
    assert metrics(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    assert metrics(trainer, "eval_loss")[-1] < 0.3
    assert metrics(trainer, "eval_accuracy")[-1] > metrics(trainer, "eval_accuracy")[0]
    assert metrics(trainer, "eval_reward_accuracy")[-1] == 1
    for margin, chosen, rejected in zip(
        *(metrics(trainer, f"rewards/{name}") for name in ("margins", "chosen", "rejected")), strict=True
    ):
        assert margin == pytest.approx(chosen - rejected, abs=1e-5)


def test_the_split_into_batches_does_not_matter_to_a_mixture_of_experts(dpo_options, tmp_path):
    runs = [
        run(
            replace(
                dpo_options,
                batch_size=size,
                accumulation_steps=4 // size,
                use_moe=True,
                out_dir=tmp_path / str(size),
            ),
            DPO,
        )
        for size in (4, 1)
    ]
    for name in ("loss", "rewards/chosen", "rewards/accuracies", "eval_bpb"):
        assert metrics(runs[1], name) == pytest.approx(metrics(runs[0], name), rel=1e-4, abs=1e-5)
    assert min(metrics(runs[0], "balance_loss")) > 0.9


def test_a_resumed_run_needs_no_reference(dpo_options, tmp_path, monkeypatch):
    whole = run(replace(dpo_options, out_dir=tmp_path / "whole"), DPO)
    monitor_step = loop.Monitor.step

    def step_and_stop(self, done, values):
        monitor_step(self, done, values)
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Monitor, "step", step_and_stop)
        run(dpo_options, DPO)
    monkeypatch.setattr(Preference, "begin", lambda *_: pytest.fail("asked the reference again"))
    resumed = run(replace(dpo_options, from_resume=True), DPO)
    for name in ("loss", "rewards/margins", "eval_margin"):
        assert metrics(resumed, name) == metrics(whole, name)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())
    with pytest.raises(UserError, match=r"another run: data to evaluate on \(its content\) was"):
        run(replace(dpo_options, from_resume=True, eval_path=dpo_options.data_path), DPO)


def test_a_loss_that_is_no_number_names_the_pair(dpo_options, monkeypatch, capsys):
    begin = Preference.begin

    def poisoned(self, model, datasets, *rest):
        begin(self, model, datasets, *rest)
        datasets[0].reference[30] = torch.nan

    monkeypatch.setattr(Preference, "begin", poisoned)
    run(replace(dpo_options, max_steps=None), DPO)
    said = r"step \d+ is left out: the loss or its gradient is not finite; .* lines ([\d, ]+, )?31\b"
    assert re.search(said, capsys.readouterr().out)


def test_pairs_that_are_too_long(dpo_options, capsys):
    run(replace(dpo_options, max_seq_len=56, max_steps=1), DPO)
    out = capsys.readouterr().out
    assert "of 41 pairs 12 are left out, since chosen and rejected together are longer than" in out
    with pytest.raises(UserError, match="no record fits into --max_seq_len 8"):
        run(replace(dpo_options, max_seq_len=8), DPO)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive(beta):
    with pytest.raises(UserError, match="--beta is"):
        DPOOptions(beta=beta)


def test_two_processes_train_like_one(dpo_options, tmp_path):
    """Of the last step's rows the second process has none."""
    options = replace(dpo_options, batch_size=4, accumulation_steps=1, max_steps=None)
    alone = run(replace(options, out_dir=tmp_path / "alone"), DPO)
    names = (
        "data_path",
        "eval_path",
        "from_weight",
        "out_dir",
        "dtype",
        "compile",
        "optimizer",
        "learning_rate",
        "epochs",
        "eval_interval",
    )
    given = [f"--{name}={getattr(options, name)}" for name in names]
    size = [f"--{name}={value}" for name, value in (SIZE | {"max_seq_len": 128, "batch_size": 4}).items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(ROOT / "trainer" / "train_dpo.py"), "--accumulation_steps=1", *given, *size],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (options.out_dir / "runs" / "rlhf_64" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for name in ("loss", "rewards/chosen", "rewards/accuracies", "eval_loss", "eval_bpb"):
        assert [e[name] for e in entries if name in e] == pytest.approx(
            metrics(alone, name), rel=1e-4, abs=1e-6
        )
