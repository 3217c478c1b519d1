"""Steps that are left out, the way back to a checkpoint, and passes that memory has no room for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from minimind.errors import UserError
from minimind.flags import WORD
from minimind.train import loop, memory
from minimind.train.checkpoint import list_checkpoints
from minimind.train.engine import Engine
from minimind.train.loop import Trainer
from minimind.train.objective import Loss, NextToken
from minimind.train.parallel import Parallel
from minimind.train.stability import FEWEST, Stability

from .conftest import PRETRAIN, metrics, run, weights


def settled(limit: int = 5) -> Stability:
    """After enough steps of 1,000 tokens with a loss of 2 ± 0.1."""
    stability = Stability(limit)
    for i in range(FEWEST):
        assert stability.objection(2.0 + (0.1 if i % 2 else -0.1), 1000, 1.0) is None
    return stability


def test_a_leap_is_left_out_and_does_not_count_as_usual():
    stability = settled()
    for _ in range(3):
        assert "leaps to 3.000" in stability.objection(3.0, 1000, 1.0)
    assert (stability.skipped, stability.in_a_row) == (3, 3)
    assert stability.objection(2.1, 1000, 1.0) is None
    assert (stability.skipped, stability.in_a_row) == (3, 0)


@pytest.mark.parametrize(("loss", "units"), [(2.5, 1000), (3.0, 20), (0.1, 1000)])
def test_what_scatters_anyway_is_no_leap(loss, units):
    """Less than half a nat; the few tokens of an epoch's last step; a loss that falls."""
    assert settled().objection(loss, units, 1.0) is None


def test_a_loss_that_falls_fast_is_no_leap():
    stability = Stability(5)
    for step in range(200):
        assert stability.objection(9.0 / (1 + step / 20), 1000, 1.0) is None


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan"))])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(loss, norm):
    assert "not finite" in Stability(5).objection(loss, 10, norm)


def test_its_state_is_plain_and_complete():
    stability = settled()
    stability.objection(9.0, 1000, 1.0)
    again = Stability(5)
    again.load_state_dict(json.loads(json.dumps(stability.state_dict())))
    assert again == stability


class Diverges(NextToken):
    """A training that breaks at some step, again and again while the learning rate is as high."""

    def __init__(self, at: int, times: int) -> None:
        self.at, self.times, self.seen = at, times, 0

    def loss(self, model, batch, balance_coef):
        loss = super().loss(model, batch, balance_coef)
        if not torch.is_grad_enabled():
            return loss
        self.seen += 1
        if self.seen <= self.at or not self.times:
            return loss
        if self.seen == self.at + 3:  # the third bad step in a row: the run goes back
            self.seen, self.times = self.at - 1, self.times - 1
        return Loss(loss.total * float("nan"), loss.logged * float("nan"), {})


def one_pass(options, **more):
    return replace(options, batch_size=8, accumulation_steps=1, save_interval=2, skip_limit=3, **more)


def test_steps_that_keep_failing_send_the_run_back_at_half_the_rate(options, capsys):
    given = one_pass(options, max_steps=12, optimizer="adamw")
    trainer = run(given, replace(PRETRAIN, objective=Diverges(at=5, times=2)))
    out = capsys.readouterr().out
    assert out.count("is left out") == 6
    assert "back to the checkpoint of step 4; on from there at 0.5 of the learning rate" in out
    assert "back to the checkpoint of step 4; on from there at 0.25 of the learning rate" in out
    entries = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "lr" in entry]
    assert steps == list(range(1, 13))  # each step once in the log
    usual = metrics(run(replace(given, out_dir=options.out_dir / "usual")), "lr")
    rates = [entry["lr"] for entry in entries if "lr" in entry]
    assert rates == pytest.approx([rate * (1 if i < 4 else 0.25) for i, rate in enumerate(usual)])
    assert len(metrics(trainer)) == 12


def test_when_going_back_does_not_help_the_run_ends(options):
    with pytest.raises(UserError, match=r"3 steps in a row .* step 8, after going back 3 times"):
        run(one_pass(options, max_steps=12), replace(PRETRAIN, objective=Diverges(at=5, times=99)))
    folder = options.out_dir / "runs" / "pretrain_64" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)][-1] == "step_00000004"
    with pytest.raises(UserError, match="3 steps in a row were left out, up to step 3; their records"):
        run(one_pass(options, max_steps=12), replace(PRETRAIN, objective=Diverges(at=0, times=99)))


class Large(NextToken):
    """Needs too much memory for more than 3 rows."""

    def loss(self, model, batch, balance_coef):
        if torch.is_grad_enabled() and len(batch.input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss(model, batch, balance_coef)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_gradient_that_overflows_in_fp16_leaves_out_the_whole_step(options, monkeypatch, wrong):
    """And not only the optimizer that it belongs to: with joint clipping it spoils all gradients."""
    backward, passes = Engine.backward, []

    def overflowing(self: Engine, loss: torch.Tensor) -> None:
        backward(self, loss)
        passes.append(loss)
        if len(passes) == 6:
            self.model.model.embed_tokens.weight.grad[5, 0] = wrong

    monkeypatch.setattr(Engine, "backward", overflowing)
    skip, skipped = Engine.skip, []
    monkeypatch.setattr(Engine, "skip", lambda self: (skipped.append(len(passes)), skip(self)))
    fp16 = Parallel(torch.device("cpu"), torch.float16)  # which no flag gives on a CPU
    trainer = Trainer(PRETRAIN, replace(options, grad_clip=0.5), fp16)
    assert trainer.run() == 0
    assert 6 in skipped
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


def test_out_of_memory_halves_the_batch_and_keeps_the_step(options, capsys):
    given = replace(options, batch_size=16, accumulation_steps=1, max_steps=6, optimizer="adamw")
    trainer = run(given, replace(PRETRAIN, objective=Large()))
    out = capsys.readouterr().out
    assert out.count("not enough memory for") == 3  # 16, 8 and 4 rows, each once
    assert "for 4 rows at once; on with 2, in steps as before (--batch_size 2 --global_batch_size 16)" in out
    small = replace(given, batch_size=2, accumulation_steps=8, out_dir=options.out_dir / "small")
    assert metrics(trainer) == metrics(run(small))
    assert all(torch.equal(t, weights(trainer)[n]) for n, t in weights(run(small)).items())


def test_one_row_that_is_too_large_is_a_sentence(options, monkeypatch):
    monkeypatch.setattr(Large, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(UserError, match="not enough memory on cpu; lower"):
        loop.train(replace(PRETRAIN, objective=Large()), replace(options, max_steps=2))


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_batch_size_auto_takes_what_fits_and_trains_alike(options, monkeypatch, capsys, rows):
    """Measured memory: 1 GB for the model and 1 GB a row."""
    peaks = iter([3e9, 5e9])
    monkeypatch.setattr(memory, "peak_memory", lambda _: next(peaks))
    monkeypatch.setattr(memory, "usable_memory", lambda _: 1.01e9 + rows * 1e9)
    given = replace(options, max_steps=4, global_batch_size=16, optimizer="adamw")
    auto = run(replace(given, batch_size=WORD))
    taken = {1: 1, 5: 4, 1000: 16}[rows]  # 5 fit, but four passes of 4 are as many as of 5
    assert f"--batch_size auto: {taken} rows at once, in steps of 16" in capsys.readouterr().out
    fixed = run(replace(given, batch_size=taken, out_dir=options.out_dir / "fixed"))
    assert metrics(auto) == metrics(fixed)


def test_batch_size_auto_with_no_room_is_a_sentence(options, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda _: 1e6)
    with pytest.raises(UserError, match="not even one row fits"):
        run(replace(options, batch_size=WORD))


def test_batch_size_auto_measures_real_memory(options):
    given = replace(options, batch_size=WORD, max_seq_len=256)
    trainer = loop.Trainer(PRETRAIN, given, loop.setup("cpu", "auto"))
    assert 1 <= trainer.shares.batch_size <= trainer.shares.rows_per_step
    small, large = (memory.measured(trainer.engine, trainer.objective, trainer.data, n) for n in (1, 32))
    assert large > small + 31 * 256 * 6400 * 4  # the logits alone
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_keep_last(options):
    trainer = run(replace(options, save_interval=1, max_steps=5, keep_last=3))
    names = [path.name for path in list_checkpoints(trainer.run_dir / "checkpoints")]
    assert names == ["step_00000003", "step_00000004", "step_00000005"]
