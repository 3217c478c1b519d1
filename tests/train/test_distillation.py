"""White-box distillation: the formula in float64, the teacher left alone, teachers of every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minimind.config import PRESETS, ModelConfig
from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.stages.distill import DistillOptions
from minimind.tokenizer import Tokenizer
from minimind.train.checkpoint import list_checkpoints
from minimind.train.distillation import Distillation
from minimind.train.loop import Stage
from minimind.train.losses import at_targets
from minimind.train.monitor import training_flops
from minimind.train.parallel import setup
from minimind.weights import load_state, save_weights

from .conftest import metrics, run, weights

TEACHER = ModelConfig(hidden_size=96, num_hidden_layers=3)


@pytest.fixture
def distill_options(sft_options) -> DistillOptions:
    return replace(DistillOptions(**vars(sft_options)), from_weight="none", max_steps=3)


def write_teacher(options: DistillOptions, config: ModelConfig = TEACHER):
    """A teacher with opinions: the fresh model's are all alike."""
    torch.manual_seed(7)
    model = MiniMind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = options.out_dir / f"full_sft_{config.name}.pth"
    save_weights(model, path)
    return path


def distill(options: DistillOptions, teacher, alpha: float = 0.5, temperature: float = 2.0):
    objective = Distillation(teacher, "make it", alpha, temperature)
    return run(options, Stage("full_dist", "conversation", ("full_sft", "pretrain"), objective))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 3.0)])
@pytest.mark.parametrize("use_moe", [False, True])
def test_the_loss_is_the_formula_in_float64(distill_options, alpha, temperature, use_moe):
    options = replace(distill_options, max_steps=1, use_moe=use_moe)
    trainer = distill(options, write_teacher(options), alpha, temperature)
    batch = trainer.data.batch(0, 0, 4)
    batch.loss_mask = batch.loss_mask * 3  # weights count
    with torch.no_grad():
        student, teacher = (
            at_targets(model, batch).logits.double() for model in (trainer.model, trainer.objective.teacher)
        )
    loss = trainer.objective.loss(trainer.model, batch, 0.0)

    labels = batch.labels.flatten()[batch.targets_at]
    cross_entropy = -student.log_softmax(-1)[range(len(labels)), labels]
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    divergence = (p * (p.log() - q.log())).sum(-1)
    expected = 3 * (alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence).sum().item()
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.logged.item() == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["kl"].item() == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert loss.metrics["cross_entropy"].item() == pytest.approx(cross_entropy.mean().item(), rel=1e-4)


def test_the_gradient_is_the_formulas_too(distill_options):
    """With the teacher's logits as the student's own, only the data pulls."""
    trainer = distill(replace(distill_options, max_steps=1), write_teacher(distill_options))
    student, teacher = torch.randn(2, 5, 40, dtype=torch.float64).unbind()
    student.requires_grad_()
    trainer.objective.divergence(student, teacher).sum().backward()
    temperature = trainer.objective.temperature
    expected = ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / temperature
    assert torch.allclose(student.grad, expected.detach(), atol=1e-12)


def test_the_teacher_stays_as_it_is_and_the_student_comes_closer(distill_options):
    path = write_teacher(distill_options)
    before = {name: tensor.clone() for name, tensor in load_state(path, "").items()}
    trainer = distill(replace(distill_options, max_steps=60, epochs=60), path, alpha=0.0, temperature=1.0)
    kl = metrics(trainer, "kl")
    assert kl[-1] < 0.5 * kl[0]
    teacher = trainer.objective.teacher
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(t, before[n].float()) for n, t in teacher.state_dict().items())
    assert trainer.flops_per_token == 6 * trainer.model.num_parameters + 2 * teacher.num_parameters
    assert trainer.weights_path.name == "full_dist_64.pth"


def test_experts_may_teach_and_learn(distill_options):
    moe = replace(TEACHER, num_experts=4)
    trainer = distill(replace(distill_options, use_moe=True), write_teacher(distill_options, moe))
    assert metrics(trainer, "balance_loss")[-1] >= 0.99
    assert metrics(trainer, "kl")[-1] > 0
    visited = training_flops(trainer.objective.teacher) / 4
    assert visited < trainer.objective.teacher.num_parameters  # half of the experts are idle


def test_a_resumed_run_is_the_same_run(distill_options):
    path = write_teacher(distill_options)
    whole = distill(replace(distill_options, max_steps=4), path)
    expected = weights(whole)
    folder = whole.run_dir / "checkpoints"
    options = replace(distill_options, max_steps=4, save_interval=2, from_resume=True)
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000004"]
    distill(replace(options, from_resume=False), path)
    (folder / "step_00000004.sha256").unlink()
    resumed = distill(options, path)
    assert all(torch.equal(t, expected[n]) for n, t in weights(resumed).items())


def test_another_teacher_makes_another_run(distill_options):
    path = write_teacher(distill_options)
    distill(distill_options, path)
    elsewhere = path.rename(path.with_name("teacher.pth"))
    distill(replace(distill_options, from_resume=True), elsewhere)
    write_teacher(distill_options, replace(TEACHER, num_hidden_layers=2))
    with pytest.raises(UserError, match=r"belongs to another run: teacher \(its content\) was"):
        distill(replace(distill_options, from_resume=True), path)


def test_scores_of_other_data_make_another_run(distill_options, conversations, tmp_path):
    path = write_teacher(distill_options)
    apart = tmp_path / "apart.jsonl"
    apart.write_bytes(conversations.read_bytes())
    distill(replace(distill_options, eval_path=apart), path)
    elsewhere = apart.rename(tmp_path / "elsewhere.jsonl")
    distill(replace(distill_options, eval_path=elsewhere, from_resume=True), path)
    elsewhere.write_text(conversations.read_text().replace("等于几", "是多少"))
    with pytest.raises(UserError, match=r"another run: data to evaluate on \(its content\) was"):
        distill(replace(distill_options, eval_path=elsewhere, from_resume=True), path)


def test_mistakes_get_a_sentence(distill_options, tmp_path):
    with pytest.raises(UserError, match=r"no weights at .*full_sft_768\.pth; make them with: make it"):
        distill(distill_options, distill_options.teacher)
    other = write_teacher(distill_options, replace(TEACHER, vocab_size=6000))
    with pytest.raises(UserError, match="a vocabulary of 6000, the student one of 6400"):
        distill(distill_options, other)
    path = write_teacher(distill_options)
    record = path.parent / "runs" / path.stem / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"tokenizer_fingerprint": "another"}', encoding="utf-8")
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        distill(distill_options, path)
    for name, value in (("alpha", 1.5), ("alpha", float("nan")), ("temperature", 0.0)):
        with pytest.raises(UserError, match=f"--{name} is {value}; it must"):
            replace(distill_options, **{name: value})


def test_the_teacher_is_named_by_preset_or_path(distill_options):
    assert distill_options.teacher == distill_options.out_dir / f"full_sft_{PRESETS['base'].name}.pth"
    moe = replace(distill_options, teacher_preset="moe")
    assert moe.teacher.name == "full_sft_640_moe.pth"
    assert replace(moe, teacher_path="x.pth").teacher == "x.pth"


def test_bf16_products_leave_the_loss_in_fp32(distill_options):
    options = replace(distill_options, dtype="bfloat16", max_steps=1)
    trainer = distill(options, write_teacher(options))
    with setup("cpu", "bfloat16").autocast():
        loss = trainer.objective.loss(trainer.model, trainer.data.batch(0, 0, 2), 0.0)
    assert loss.total.dtype == torch.float32
    assert Tokenizer.load().vocab_size == trainer.objective.teacher.config.vocab_size
