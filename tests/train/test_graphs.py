"""Passes replayed from graphs, which a CPU has not: here a capture is run again, over the same memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minimind import lora
from minimind.config import ModelConfig
from minimind.model import MiniMind
from minimind.stages.pretrain import PretrainOptions
from minimind.train import graphs
from minimind.train.graphs import PASSES_BEFORE, ReplayedDecoder, replay_passes
from minimind.train.loop import Trainer
from minimind.train.parallel import Parallel, setup
from tests.train.conftest import PRETRAIN

DENSE = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=101)
KINDS = {"dense": DENSE, "lora": DENSE, "moe": replace(DENSE, num_experts=4)}


class Again:
    """In the place of a `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self, function: Callable[[], list[Tensor]]) -> None:
        self.function, self.with_gradients = function, torch.is_grad_enabled()
        self.outputs = function()

    def replay(self) -> None:
        Again.replays += 1
        with torch.set_grad_enabled(self.with_gradients):
            found = self.function()
        for output, value in zip(self.outputs, found, strict=True):
            output.copy_(value)


@pytest.fixture
def graphs_on_cpu(monkeypatch) -> None:
    def graph_of(function: Callable[[], list[Tensor]], before: Again | None = None):
        graph = Again(function)
        return graph.outputs, graph

    monkeypatch.setattr(graphs, "graph_of", graph_of)
    monkeypatch.setattr(Again, "replays", 0)


def two_models(kind: str) -> tuple[MiniMind, MiniMind]:
    """The same weights twice; the passes of the second are replayed."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = MiniMind(KINDS[kind])
        if kind == "lora":
            lora.attach(model, rank=2)
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.08)
        models.append(model)
    models[1].model.forward = ReplayedDecoder(models[1].model)
    return models[0], models[1]


def batch(seed: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(101, (rows, 24), generator=generator)
    documents = (torch.arange(24) // (5 + seed % 7)).int().expand(rows, -1)
    return ids, torch.arange(24).expand(rows, -1) % (5 + seed % 7), documents


def loss(model: MiniMind, *inputs: Tensor) -> Tensor:
    out = model(*inputs, logits_at=inputs[0].flatten().nonzero()[:, 0])
    return out.logits.square().mean() + sum(r.balance_loss.sum() for r in out.routing) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_passes_accumulate_what_they_would_uncaptured(kind, graphs_on_cpu):
    plain, replayed = two_models(kind)
    for step, shapes in enumerate(([2, 2, 2], [2, 2], [3, 2, 2], [2, 3, 2], [3], [3, 3])):
        for i, rows in enumerate(shapes):
            inputs = batch(10 * step + i, rows)
            expected, found = loss(plain, *inputs), loss(replayed, *inputs)
            expected.backward()
            found.backward()
            torch.testing.assert_close(found, expected)
        for (name, p), q in zip(plain.named_parameters(), replayed.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}")
            p.grad = q.grad = None  # as a step ends
            p.data *= 0.9
            q.data *= 0.9
    assert Again.replays == 2 * (2 + 1 + 1 + 2)  # of the second step, the fourth and what comes after it


def test_what_is_no_training_pass_is_not_replayed(graphs_on_cpu):
    plain, replayed = two_models("dense")
    for _ in range(PASSES_BEFORE + 1):
        replayed.zero_grad()
        loss(replayed, *batch(0)).backward()
    assert Again.replays == 2
    with torch.no_grad():
        torch.testing.assert_close(loss(replayed, *batch(1)), loss(plain, *batch(1)))
    replayed.zero_grad()
    first, second = loss(replayed, *batch(1)), loss(replayed, *batch(2))  # before the first's backward pass
    (first + 2 * second).backward()
    (loss(plain, *batch(1)) + 2 * loss(plain, *batch(2))).backward()
    for p, q in zip(plain.parameters(), replayed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert Again.replays == 4


def test_what_cannot_be_captured_is_run(monkeypatch):
    attempts = []

    def refuse(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "graph_of", refuse)
    plain, replayed = two_models("dense")
    for seed in range(PASSES_BEFORE + 2):
        assert loss(replayed, *batch(seed)) == loss(plain, *batch(seed))
    assert len(attempts) == 1


def test_a_frozen_model_is_replayed_forward(graphs_on_cpu):
    plain, _ = two_models("moe")
    replayed = copy.deepcopy(plain).requires_grad_(False)
    replayed.model.forward = ReplayedDecoder(replayed.model)
    with torch.inference_mode():
        for seed in range(PASSES_BEFORE + 3):
            torch.testing.assert_close(loss(replayed, *batch(seed)), loss(plain, *batch(seed)))
    assert Again.replays == 3
    assert not any(tensor.is_inference() for tensor in replayed.model.forward.captured.inputs)


def test_long_passes_are_not_captured(graphs_on_cpu, monkeypatch):
    monkeypatch.setattr(graphs, "TOKENS", 2 * 24 - 1)
    _, replayed = two_models("dense")
    for seed in range(PASSES_BEFORE + 2):
        replayed.zero_grad()
        loss(replayed, *batch(seed)).backward()
    assert not Again.replays


def test_a_run_learns_the_same_from_replayed_passes(graphs_on_cpu, options: PretrainOptions):
    losses = []
    for replays in (False, True):
        trainer = Trainer(
            PRETRAIN, replace(options, out_dir=options.out_dir / str(replays)), setup("cpu", "float32")
        )
        if replays:
            trainer.model.model.forward = ReplayedDecoder(trainer.model.model)
        trainer.run()
        lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert Again.replays == 2 * (7 * 2 - PASSES_BEFORE)
    assert len(losses[0]) == 7
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_one_process_on_a_gpu_replays_its_passes():
    def replays(**place: object) -> bool:
        model = MiniMind(DENSE)
        replay_passes(model, Parallel(**{"device": torch.device("cuda"), "dtype": torch.bfloat16} | place))
        return isinstance(model.model.forward, ReplayedDecoder)

    assert replays()
    assert not replays(device=torch.device("cpu"))
    assert not replays(world_size=2)
    assert not replays(sharded=True)
