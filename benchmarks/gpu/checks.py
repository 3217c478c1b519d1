"""Whether a GPU computes what a CPU does: one packed batch, a short training and some answers on both.

Each check has a number and the most it may be. Differences are relative to the CPU's in fp32, and on a GPU
fp32 means exact products, not TF32.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu.jobs import caught, wait_for_turn
from benchmarks.gpu.speed import Setting
from minimind import moe
from minimind.chat.generate import generate_batch
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.config import ModelConfig
from minimind.data.batches import Batch
from minimind.data.prepare import prepare
from minimind.evaluate.endings import Item, log_likelihoods
from minimind.model import BlockMask, MiniMind, attention_mask
from minimind.stages.pretrain import PretrainOptions
from minimind.tokenizer import Tokenizer
from minimind.train.compiling import parts
from minimind.train.datasets import rows_of
from minimind.train.graphs import PASSES_BEFORE, replay_passes
from minimind.train.loop import Stage, Trainer
from minimind.train.losses import at_targets
from minimind.train.monitor import matmul_rate
from minimind.train.objective import NextToken
from minimind.train.parallel import Parallel, choose_device, setup
from minimind.train.signals import StopSignals
from minimind.train.step import optimizer_step

Check = dict[str, Any]
THREADS = 4  # of the CPU that a GPU is compared with
BALANCE = 0.1  # coefficient of the experts' balance loss


def peak_rate(setting: Setting) -> float:
    """Floating-point operations a second of a large bf16 product here."""
    wait_for_turn()
    return matmul_rate(choose_device(setting.device), torch.bfloat16)


def all_checks(setting: Setting) -> list[Check]:
    torch.set_float32_matmul_precision("highest")
    # The others compile meanwhile, and threads that wait for each other wait for all of them.
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    device = choose_device(setting.device)
    size = (64, 1) if setting.dry_run else (256, 4)
    dense = ModelConfig(hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=4)
    checks = []
    for kind, config in (("dense", dense), ("moe", replace(dense, num_experts=4))):
        model, batch = random_model(config), packed_batch(setting)
        for make in (against_cpu, in_bf16, apart, compiled, replayed, endings):
            checks += run(kind, make, model, batch, device)
        checks += run(kind, training_and_answers, config, setting)
    checks += run("moe", experts_together, device)
    return checks


def run(kind: str, make: Callable[..., Iterator[Check]], *arguments: Any) -> list[Check]:
    """The checks that `make` yields; a fault of it is one more that has failed."""
    found = caught(lambda: list(make(*arguments)))
    if isinstance(found, dict):
        found = [{"check": make.__name__, "value": None, "limit": None, "passed": False, **found}]
    return [{"model": kind} | check for check in found]


def check(name: str, value: float | Tensor, limit: float) -> Check:
    return {"check": name, "value": float(value), "limit": limit, "passed": float(value) <= limit}


def random_model(config: ModelConfig) -> MiniMind:
    """Weights away from the initial zeros, so that every path carries a signal."""
    torch.manual_seed(0)
    model = MiniMind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.04)
    return model


def packed_batch(setting: Setting) -> Batch:
    tokenizer = Tokenizer.load()
    store = prepare(setting.data / "pretrain_hq.jsonl", "pretrain", tokenizer, on_bad_record="skip")
    return rows_of(store, tokenizer, 128 if setting.dry_run else 512).batch(0, 0, 8)


def loss_and_gradients(
    model: MiniMind,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The mean loss, and the gradient of each parameter, computed on `device`, compiled with a `backend`."""
    model = copy.deepcopy(model).to(device)
    for part in parts(model.model, Parallel(device, dtype)) if backend else ():
        part.compile(backend=backend)
    batch = batch.to(device)
    with torch.autocast(device.type, dtype) if dtype is not torch.float32 else nullcontext():
        loss = NextToken().loss(model, batch, BALANCE).total / batch.num_target_tokens
    loss.backward()
    return loss.detach().cpu(), [p.grad.cpu() for p in model.parameters()]


def distance(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Of the gradient that is furthest off, relative to its length."""
    return torch.stack([(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True)]).max()


def against_cpu(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    loss, gradients = loss_and_gradients(model, batch, device)
    cpu_loss, cpu_gradients = loss_and_gradients(model, batch, torch.device("cpu"))
    yield check("loss, fp32", (loss / cpu_loss - 1).abs(), 1e-4)
    # A token whose second and third expert are even may go to either.
    limit = 2e-2 if model.config.num_experts else 1e-3
    yield check("gradients, fp32", distance(gradients, cpu_gradients), limit)


def in_bf16(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    exact, exact_gradients = loss_and_gradients(model, batch, device)
    rounded, gradients = loss_and_gradients(model, batch, device, torch.bfloat16)
    yield check("loss, bf16 against fp32", (rounded / exact - 1).abs(), 5e-3)
    limit = 0.4 if model.config.num_experts else 0.1  # rounding sends tokens to other experts
    yield check("gradients, bf16 against fp32", distance(gradients, exact_gradients), limit)


def apart(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    """Documents of a row do not see each other, whichever kernel keeps them apart."""
    model, batch = copy.deepcopy(model).to(device), batch.to(device)
    mask = attention_mask(batch.document_ids, model.config.head_dim)
    wants_blocks = device.type == "cuda"
    yield check("a GPU has a block mask", float(isinstance(mask, BlockMask) != wants_blocks), 0)
    first = batch.document_ids == 0  # (B, T)
    other = (batch.input_ids + 1) % model.config.vocab_size
    changed = replace(batch, input_ids=torch.where(first, other, batch.input_ids))
    rest = ~first.flatten()[batch.targets_at]
    limits = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # experts' products change their size
    for dtype, limit in limits.items():
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
            before, after = (at_targets(model, b).logits for b in (batch, changed))
        name = str(dtype).removeprefix("torch.")
        yield check(f"a changed document, seen by others, {name}", (before - after)[rest].abs().max(), limit)
        itself = (before - after)[~rest].abs().max()
        yield check(f"a changed document, not seen by itself, {name}", float(itself < 0.2), 0)


def compiled(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    """As training does on a GPU; on a CPU, where the whole compiler takes a minute, its first part alone."""
    eager, eager_gradients = loss_and_gradients(model, batch, device, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if device.type == "cuda" else "eager"
    loss, gradients = loss_and_gradients(model, batch, device, torch.bfloat16, backend)
    yield check("nothing was compiled", float(counters["stats"]["unique_graphs"] == 0), 0)
    if device.type == "cuda":
        yield check("breaks of the compiled graph", sum(counters["graph_break"].values()), 0)
    yield check("loss, compiled against eager, bf16", (loss / eager - 1).abs(), 2e-3)
    limit = 0.4 if model.config.num_experts else 0.1
    yield check("gradients, compiled against eager, bf16", distance(gradients, eager_gradients), limit)


def replayed(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    """Passes from CUDA graphs against passes without, in steps of two."""
    if device.type != "cuda":
        return
    parallel, batch = Parallel(device, torch.bfloat16), batch.to(device)
    plain, replays = (copy.deepcopy(model).to(device) for _ in range(2))
    for part in (*parts(plain.model, parallel), *parts(replays.model, parallel)):
        part.compile()
    replay_passes(replays, parallel)
    for step in range(PASSES_BEFORE + 1):
        for trained in (plain, replays):
            trained.zero_grad()
            for i in range(2):
                ids = (batch.input_ids + step + i) % model.config.vocab_size
                with parallel.autocast():
                    loss = NextToken().loss(trained, replace(batch, input_ids=ids), BALANCE)
                (loss.total / batch.num_target_tokens).backward()
            del loss  # a capture would wait for what is left of it
    yield check("nothing was captured", float(replays.model.forward.captured is None), 0)
    gradients = [[p.grad for p in trained.parameters()] for trained in (replays, plain)]
    yield check("gradients, replayed against launched, bf16", distance(*gradients), 1e-2)


def endings(model: MiniMind, batch: Batch, device: torch.device) -> Iterator[Check]:
    """What multiple choice is scored by: prompts and their endings, many in a row."""
    ids = batch.input_ids.flatten().tolist()[:120]
    items = [Item(ids[: 20 + i], [ids[i : i + 1 + j] for j in range(4)]) for i in range(100)]

    def found(place: torch.device, dtype: torch.dtype) -> Tensor:
        """(items, endings)"""
        parallel = Parallel(place, dtype)
        batches = log_likelihoods(copy.deepcopy(model).to(place).eval(), [items], parallel)
        return torch.tensor([logps for _, logps in sorted(pair for b in batches for pair in b)])

    exact = found(torch.device("cpu"), torch.float32)
    yield check("endings' log-likelihoods, fp32", (found(device, torch.float32) - exact).abs().max(), 1e-3)
    limit = 2.0 if model.config.num_experts else 0.2  # nats; rounding sends tokens to other experts
    yield check("endings' log-likelihoods, bf16", (found(device, torch.bfloat16) - exact).abs().max(), limit)


def training_and_answers(config: ModelConfig, setting: Setting) -> Iterator[Check]:
    """A short run in fp32 on both; then what both say with the weights of the CPU."""
    losses, model = {}, None
    for device in dict.fromkeys((setting.device, "cpu")):
        model, losses[device] = short_training(config, setting, device)
    expected, found = torch.tensor(losses["cpu"]), torch.tensor(losses[setting.device])
    yield check("losses of a training, fp32", (found / expected - 1).abs().max(), 5e-3)
    yield check("a training that does not learn", float(expected[-1] > expected[0]), 0)

    tokenizer = Tokenizer.load()
    prompts = [
        tokenizer.encode_document(text)[:-1] for text in ("中国的历史", "The light of", "因为我们学习")
    ]
    options = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=32)
    answers = []
    for device in ("cpu", choose_device(setting.device)):
        exact = InferenceModel(copy.deepcopy(model).to(device).eval(), "fp32")
        answers.append(generate_batch(exact, prompts, options))
    yield check("greedy answers that differ", sum(a != b for a, b in zip(*answers, strict=True)), 0)


def short_training(config: ModelConfig, setting: Setting, device: str) -> tuple[MiniMind, list[float]]:
    """The model, and the loss of each step."""
    with tempfile.TemporaryDirectory(prefix="minimind_gpu_") as folder:
        options = PretrainOptions(
            data_path=setting.data / "pretrain_hq.jsonl",
            out_dir=Path(folder),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            use_moe=bool(config.num_experts),
            max_seq_len=128,
            batch_size=4 if setting.dry_run else 16,
            accumulation_steps=1,
            learning_rate=2e-3,
            warmup_iters=0,
            dtype="float32",
            compile="0",
            device=device,
            epochs=100,
            max_steps=10 if setting.dry_run else 15,
            on_bad_record="skip",
        )
        parallel = setup(device, "float32")
        torch.set_float32_matmul_precision("highest")  # `setup` chose TF32
        trainer = Trainer(Stage("pretrain", data_kind="pretrain"), options, parallel)
        trainer.peak_rate = 1.0
        values = [
            optimizer_step(trainer, step, batches, StopSignals())["loss"]
            for step, batches in enumerate(trainer.step_batches(0))
        ]
        return trainer.model.cpu(), values


def experts_together(device: torch.device) -> Iterator[Check]:
    """One product for all experts against one for each, where one expert has no token."""
    config = ModelConfig(hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_experts=4)
    experts = random_model(config).model.layers[0].mlp.experts.to(device, torch.bfloat16)
    visits = [300, 0, 17, 195]
    x = torch.randn(sum(visits), 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn_like(x)

    def outcome(y: Tensor) -> list[Tensor]:
        variables = [x, *(p for i, expert in enumerate(experts) if visits[i] for p in expert.parameters())]
        gradients = torch.autograd.grad((y * weight).sum(), variables)
        return [tensor.float() for tensor in (y.detach(), *gradients)]

    one_by_one = [expert(block) for expert, block in zip(experts, x.split(visits), strict=True)]
    together = moe.together(experts, x, torch.tensor(visits, device=device))
    idle = torch.autograd.grad((together * weight).sum(), [*experts[1].parameters()], retain_graph=True)
    value = distance(outcome(together), outcome(torch.cat(one_by_one)))
    yield check("experts in one product, bf16", value, 2e-2)
    yield check("gradient of an expert without a token", max(g.abs().max() for g in idle), 0)
