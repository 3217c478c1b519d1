"""The decoder against transformers' Llama and Granite MoE, and the properties training leans on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from minimind.config import PRESETS, ModelConfig, YarnScaling, model_config
from minimind.errors import UserError
from minimind.export.huggingface import transformers_config, transformers_state_dict
from minimind.model import QUERIES_AT_ONCE, MiniMind, attend, attention_mask
from minimind.moe import balance, filled_up

SHAPES = {
    "dense": ModelConfig(hidden_size=64, num_hidden_layers=3, vocab_size=257),
    "moe": ModelConfig(hidden_size=64, num_hidden_layers=2, vocab_size=257, num_experts=4),
    "two_shared": ModelConfig(
        hidden_size=64, num_hidden_layers=1, vocab_size=257, num_experts=4, num_shared_experts=2
    ),
    "yarn": ModelConfig(
        hidden_size=128,
        num_hidden_layers=2,
        vocab_size=257,
        rope_theta=1e4,
        max_position_embeddings=256,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64),
    ),
}


def random_model(config: ModelConfig, seed: int = 0) -> MiniMind:
    """Weights well away from the initial zeros, so that every path carries a signal."""
    torch.manual_seed(seed)
    model = MiniMind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def in_transformers(model: MiniMind, folder: Path):
    """The same weights in transformers, by way of the files it reads."""
    (folder / "config.json").write_text(json.dumps(transformers_config(model.config)))
    state = transformers_state_dict(model.state_dict(), model.config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    peer, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return peer


def name_on_disk(name: str) -> str:
    """Granite's parameters have other names in memory than in its files."""
    return (
        name.replace("router.weight", "router.layer.weight")
        .replace("experts.gate_up_proj", "input_linear.weight")
        .replace("experts.down_proj", "output_linear.weight")
    )


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("small", 25_829_888), ("base", 104_030_976), ("moe", 145_029_760), ("tiny", 4_589_824)],
)
def test_presets_have_the_published_sizes(preset, parameters):
    with torch.device("meta"):
        assert MiniMind(PRESETS[preset]).num_parameters == PRESETS[preset].num_parameters == parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_transformers(shape, tmp_path):
    ours = random_model(SHAPES[shape])
    theirs = in_transformers(ours, tmp_path)
    ids = torch.randint(1, 257, (2, 96))  # transformers gives the padding id 0 no gradient
    labels = torch.randint(0, 257, (2, 96))

    our_logits, their_logits = ours(ids).logits, theirs(ids).logits
    assert (our_logits - their_logits).abs().max() <= 1e-5
    assert our_logits.std() > 0.1  # the comparison is of signals, not of zeros

    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    our_gradients = transformers_state_dict({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    their_gradients = {name_on_disk(n): p.grad for n, p in theirs.named_parameters()}
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in our_gradients.items():
        error = (gradient - their_gradients[name]).norm() / their_gradients[name].norm()
        assert error <= 1e-4, name


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape):
    model = random_model(SHAPES[shape]).eval()
    documents = [torch.randint(0, 257, (n,)) for n in (11, 23, 6)]
    alone = [model(d[None]).logits[0] for d in documents]
    for order in ([0, 1, 2], [2, 0, 1]):
        row = torch.cat([documents[i] for i in order] + [torch.zeros(4, dtype=torch.long)])[None]
        positions = torch.cat([torch.arange(len(documents[i])) for i in order] + [torch.zeros(4).long()])
        numbers = torch.cat([torch.full((len(documents[i]),), i) for i in order] + [torch.full((4,), -1)])
        logits = model(row, positions[None], numbers[None]).logits[0]
        assert logits.isfinite().all()
        pieces = dict(zip(order, logits[:-4].split([len(documents[i]) for i in order]), strict=True))
        for i, expected in enumerate(alone):
            assert (pieces[i] - expected).abs().max() <= 1e-5


def test_logits_at_chosen_positions_only():
    model = random_model(SHAPES["dense"])
    ids = torch.randint(0, 257, (2, 8))
    at = torch.tensor([3, 15])
    torch.testing.assert_close(model(ids, logits_at=at).logits, model(ids).logits.flatten(0, 1)[at])


def test_attention_stays_within_documents_and_padding_sees_itself():
    assert attention_mask(torch.tensor([[0, 0, 1, -1, -1]]), 8)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_initial_layers_are_the_identity():
    model = MiniMind(SHAPES["dense"])
    ids = torch.randint(0, 257, (1, 5))
    hidden, _ = model.model(ids)
    torch.testing.assert_close(hidden, model.model.norm(model.model.embed_tokens(ids)))


def test_state_dict_ties_the_embedding_and_names_it_twice():
    state = MiniMind(SHAPES["dense"]).state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert "model.layers.0.self_attn.q_proj.weight" in state
    moe = MiniMind(SHAPES["moe"]).state_dict()
    for name in ("gate", "experts.3.gate_proj", "experts.0.down_proj", "shared_experts.0.up_proj"):
        assert f"model.layers.0.mlp.{name}.weight" in moe


def test_balance_loss_is_the_formula_read_directly():
    torch.manual_seed(0)
    scores = torch.randn(3, 10, 4).softmax(-1)
    top = scores.topk(2, dim=-1).indices
    is_token = torch.ones(3, 10, dtype=torch.bool)
    is_token[1, 6:] = False
    routing = balance(scores, top, is_token)
    visits = [0.0] * 4
    for row in range(3):
        tokens = [t for t in range(10) if is_token[row, t]]
        expected = 0.0
        for expert in range(4):
            count = sum(expert in top[row, t].tolist() for t in tokens)
            visits[expert] += count
            frequency = 4 / (2 * len(tokens)) * count
            probability = sum(scores[row, t, expert].item() for t in tokens) / len(tokens)
            expected += frequency * probability
        assert routing.balance_loss[row].item() == pytest.approx(expected, rel=1e-5)
    assert routing.expert_load.tolist() == pytest.approx([v / sum(visits) for v in visits])


def test_balance_loss_of_even_and_collapsed_routers():
    even = torch.full((1, 4, 4), 0.25)
    turns = torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert balance(even, turns, None).balance_loss.item() == pytest.approx(1.0)
    collapsed = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 4, 4)
    assert balance(collapsed, turns[:, :1].expand(1, 4, 2), None).balance_loss.item() == pytest.approx(2.0)


def test_moe_drops_no_token_and_routes_in_fp32():
    model = random_model(SHAPES["moe"])
    layer = model.model.layers[0].mlp
    layer.gate.weight.data.zero_()
    layer.gate.weight.data[1] = 1.0  # with positive inputs everybody wants expert 1, nobody is turned away
    x = torch.rand(1, 33, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = layer(x)
    assert routing.balance_loss.dtype == torch.float32
    assert routing.expert_load[1] == 0.5
    assert (out.float().abs().sum(-1) > 0).all()
    out32, _ = layer(x)
    one_by_one = torch.cat([layer(x[:, t : t + 1])[0] for t in range(33)], dim=1)
    torch.testing.assert_close(out32, one_by_one, atol=1e-5, rtol=1e-5)


def test_every_moe_parameter_gets_a_gradient():
    model = random_model(SHAPES["moe"])
    out = model(torch.randint(0, 257, (2, 64)))
    (out.logits.square().mean() + sum(r.balance_loss.mean() for r in out.routing)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_command_line_chooses_shapes():
    assert model_config() == PRESETS["small"]
    assert model_config(use_moe=True) == PRESETS["moe"]
    assert model_config(use_moe=False) == PRESETS["small"]
    assert model_config(hidden_size=768) == PRESETS["base"]
    assert model_config(hidden_size=768, num_hidden_layers=2).num_hidden_layers == 2
    assert model_config("tiny", num_hidden_layers=3) == replace(PRESETS["tiny"], num_hidden_layers=3)
    assert model_config(hidden_size=512, use_moe=True).num_experts == 4
    assert model_config(hidden_size=320).hidden_size == 320
    with pytest.raises(UserError, match="not a multiple"):
        model_config(hidden_size=500)


@pytest.mark.parametrize("tokens", [1, 30, 65, 150])
def test_experts_on_blocks_that_are_filled_up_compute_what_each_would_alone(tokens):
    layer = random_model(SHAPES["moe"]).model.layers[0].mlp
    x = torch.randn(tokens, 64, requires_grad=True)
    weights = torch.rand(tokens, 2, requires_grad=True)
    experts = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])  # never the last
    everywhere = torch.stack([expert(x) for expert in layer.experts], dim=1)  # (tokens, 4, 64)
    one_by_one = everywhere.gather(1, experts[..., None].expand(-1, -1, 64))
    results = []
    for out in (layer.visit_experts(x, weights, experts), (weights[..., None] * one_by_one).sum(dim=1)):
        gradients = torch.autograd.grad(out.square().sum(), [x, weights, *layer.experts.parameters()])
        results.append((out, *gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_blocks_have_few_lengths_unless_they_are_short():
    assert filled_up(torch.tensor([0, 1, 32, 33, 64, 65])).tolist() == [0, 1, 32, 64, 64, 96]


def test_attention_some_queries_at_a_time_is_pytorchs():
    queries, keys = 2 * QUERIES_AT_ONCE + 30, 2 * QUERIES_AT_ONCE + 50  # 20 keys were there before
    documents = (torch.rand(2, keys) < 0.01).cumsum(1)
    mask = torch.zeros(2, 1, keys, keys).masked_fill(~attention_mask(documents, 8), -torch.inf)[
        :, :, -queries:
    ]
    inputs = [
        torch.randn(2, heads, n, 8, requires_grad=True) for heads, n in ((4, queries), (2, keys), (2, keys))
    ]
    direction = torch.randn(2, 4, queries, 8)
    found = attend(*inputs, mask)
    expected = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out, inputs, direction) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_attention_keeps_its_probabilities_once_and_in_bf16():
    query, key, value = (torch.randn(1, heads, 5, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16).masked_fill(
        torch.ones(5, 5).triu(1).bool(), -torch.inf
    )
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        attend(query, key, value, mask)
    squares = {x.untyped_storage().data_ptr(): x.dtype for x in kept if x.numel() == 4 * 5 * 5}
    assert list(squares.values()) == [torch.bfloat16]
