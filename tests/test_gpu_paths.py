"""What the model does on a GPU alone, its mathematics simulated on a CPU: the same as what a CPU does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask

from minimind import blocks, lora, moe
from minimind.config import ModelConfig
from minimind.model import BlockMask, MiniMind, attention_mask
from minimind.train import memory, optim
from minimind.train.compiling import parts, uncompiled
from minimind.train.losses import negative_log_likelihood
from minimind.train.optim import Muon
from minimind.train.parallel import Parallel

DENSE = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=101)
MOE = ModelConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=101, num_experts=4)


SHAPES = [(48, 64), (64, 48), (48, 64), (64, 64)]


@pytest.fixture
def flex_on_cpu(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "usable", lambda *_: True)
    monkeypatch.setattr(blocks, "compiled", lambda function, **_: function)
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)  # it refuses gradients on a CPU


def random_model(config: ModelConfig) -> MiniMind:
    torch.manual_seed(0)
    model = MiniMind(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.dim() == 1, std=0.08)
    return model


def packed() -> tuple[Tensor, Tensor]:
    """Ids and document ids (2, 200), more than one block of the kernel; the second row ends in padding."""
    ids = torch.randint(101, (2, 200), generator=torch.Generator().manual_seed(1))
    documents = torch.stack((torch.arange(200) // 70, torch.arange(200) // 30)).int()
    documents[1, 150:] = -1
    return ids, documents


def logits_and_gradients(model: MiniMind, ids: Tensor, documents: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(ids, document_ids=documents).logits
    logits.square().mean().backward()
    return logits, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_a_block_mask_attends_like_a_dense_one(flex_on_cpu, monkeypatch):
    model, batch = random_model(DENSE), packed()
    assert isinstance(attention_mask(batch[1], 16), BlockMask)
    with_blocks = logits_and_gradients(model, *batch)
    monkeypatch.setattr(blocks, "usable", lambda *_: False)
    torch.testing.assert_close(with_blocks, logits_and_gradients(model, *batch))


def test_a_block_mask_keeps_documents_apart(flex_on_cpu):
    model, (ids, documents) = random_model(DENSE), packed()
    with torch.no_grad():
        before = model(ids, document_ids=documents).logits
        after = model(ids.index_fill(1, torch.arange(70), 7), document_ids=documents).logits
    torch.testing.assert_close(before[0, 70:], after[0, 70:], rtol=0, atol=0)
    assert not torch.allclose(before[0, :70], after[0, :70])


@pytest.mark.parametrize("length", [64, 200, 512, 1000])
def test_a_block_mask_is_what_all_scores_make_of_the_documents(length):
    generator = torch.Generator().manual_seed(length)
    begins = torch.rand(16, length, generator=generator) < torch.logspace(-3, -1, 16)[:, None]
    documents = begins.cumsum(dim=1).int()
    documents[4:8] = documents[4:8].masked_fill(torch.arange(length) > length // 3, -1)

    def may_look(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    expected = create_block_mask(may_look, 16, None, length, length, device="cpu")
    found = blocks.document_mask(documents)
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(expected, f"{kind}_num_blocks")
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
        indices = getattr(expected, f"{kind}_indices")
        counted = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(found, f"{kind}_indices")[counted], indices[counted])


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_all_layers_and_batches_share_what_is_compiled(config, flex_on_cpu, monkeypatch):
    monkeypatch.setattr(moe, "grouped", lambda *_: True)
    monkeypatch.setattr(blocks, "compiled", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    model, (ids, documents) = random_model(replace(config, num_hidden_layers=3)), packed()
    for part in parts(model.model, Parallel(torch.device("cuda"), torch.bfloat16)):
        part.compile(backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, document_ids=documents)
        assert counters["stats"]["unique_graphs"] == 4  # mask, angles, a layer and the last norm
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = model(ids.flip(0), document_ids=documents.flip(0)).logits
        with uncompiled(model):
            torch.testing.assert_close(found, model(ids.flip(0), document_ids=documents.flip(0)).logits)


def test_a_compiled_mixture_has_the_gradients_of_a_plain_one(monkeypatch):
    monkeypatch.setattr(moe, "grouped", lambda *_: True)
    torch._dynamo.reset()
    model, (ids, documents) = random_model(MOE), packed()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_and_gradients(model, ids, documents)
        model.model.compile(backend="aot_eager", fullgraph=True)
        found = logits_and_gradients(model, ids, documents)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-3)


def test_narrow_heads_keep_the_dense_mask():
    assert not blocks.usable(torch.device("cuda"), 8)
    assert not blocks.usable(torch.device("cpu"), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_one_product_are_experts_one_by_one(dtype, monkeypatch):
    model, batch = random_model(MOE), packed()
    model.model.layers[0].mlp.gate.weight.data[3] = 0  # little chosen
    model.model.layers[0].mlp.gate.weight.data[2] = 0
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        expected = logits_and_gradients(model, *batch)
        monkeypatch.setattr(moe, "grouped", lambda *_: True)
        found = logits_and_gradients(model, *batch)
    tolerance = {"rtol": 0.02, "atol": 2e-3} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)


def test_an_expert_without_a_token():
    experts = random_model(MOE).model.layers[0].mlp.experts
    x = torch.randn(6, 64)
    y = moe.together(experts, x, torch.tensor([4, 0, 2, 0]))
    torch.testing.assert_close(y, torch.cat((experts[0](x[:4]), experts[2](x[4:]))), rtol=1e-4, atol=1e-6)
    y.square().sum().backward()
    assert experts[0].gate_proj.weight.grad.any()
    assert not experts[1].gate_proj.weight.grad.any()


class OnGPU:
    """What `grouped` asks of a tensor."""

    device, dtype = torch.device("cuda"), torch.bfloat16


def test_experts_with_adapters_work_one_by_one():
    model = random_model(MOE)
    assert moe.grouped(OnGPU, model.model.layers[0].mlp.experts)
    lora.attach(model, targets=["up_proj"])
    assert not moe.grouped(OnGPU, model.model.layers[0].mlp.experts)


def test_experts_whose_weights_are_elsewhere_work_one_by_one():
    experts = random_model(MOE).model.layers[0].mlp.experts
    experts[1].down_proj.weight.data = torch.empty(0)  # as DeepSpeed leaves a weight that it has split
    assert not moe.grouped(OnGPU, experts)


@pytest.mark.parametrize("at_once", [1, 8])
def test_matrices_updated_together_are_what_pytorchs_muon_makes_of_each(at_once, monkeypatch):
    monkeypatch.setattr(optim, "ON_CPU", at_once)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    together, one_by_one = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        if step == 2:  # as after `zero_grad`, where a matrix took no part
            ours[1].grad = theirs[1].grad = None
        together.step()
        one_by_one.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (b - before).norm() > 0.1
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # both sum in bf16, in another order
        torch.testing.assert_close(
            together.state[a]["momentum_buffer"], one_by_one.state[b]["momentum_buffer"]
        )


def test_the_likelihood_of_rounded_logits_is_summed_in_fp32():
    logits, labels = torch.randn(9, 101, dtype=torch.bfloat16), torch.arange(9)
    expected = -logits.double().log_softmax(-1)[labels, labels]
    nll = negative_log_likelihood(logits, labels)
    assert nll.dtype is torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_gpus_pass_takes_part_of_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 24e9)
    gpu = torch.device("cuda")
    rows = {
        hidden: memory.rows_worthwhile(ModelConfig(hidden_size=hidden), 512, gpu) for hidden in (256, 768)
    }
    assert 30 < rows[768] < rows[256] < 300
    assert memory.rows_worthwhile(ModelConfig(), 32768, gpu) == 1


@pytest.mark.parametrize(
    ("length", "mostly_frozen", "rows"),
    [(512, False, 8), (512, True, 2), (340, False, 12), (8192, False, 1), (8192, True, 1)],
)
def test_a_cpus_pass_has_some_thousand_tokens(length, mostly_frozen, rows):
    assert memory.rows_worthwhile(ModelConfig(), length, torch.device("cpu"), mostly_frozen) == rows
