"""The mixture of experts' benchmark: its rivals do as much work, and compute what they are to compute."""

from __future__ import annotations

import json

import torch

from benchmarks.moe_speed import DENSE, MASKS, OURS, BenchmarkOptions, config_of, main, with_masks
from minimind.config import PRESETS
from minimind.model import MiniMind
from minimind.moe import MoE
from minimind.train.monitor import training_flops


def test_a_token_meets_as_many_weights_in_the_dense_model():
    options = BenchmarkOptions()
    with torch.device("meta"):
        dense, mixture = (MiniMind(config_of(name, options)) for name in (DENSE, OURS))
    assert mixture.config == PRESETS["moe"]
    routers = sum(layer.mlp.gate.weight.numel() for layer in mixture.model.layers)
    assert training_flops(dense) == training_flops(mixture) - 6 * routers
    assert dense.num_parameters < mixture.num_parameters


def test_the_loop_with_masks_is_the_same_mixture():
    torch.manual_seed(0)
    mixture = MoE(config_of(OURS, BenchmarkOptions(hidden_size=64)))
    x = torch.randn(50, 64, requires_grad=True)
    weights, experts = torch.randn(50, 4).softmax(dim=-1).topk(2)
    ours, masks = mixture.visit_experts(x, weights, experts), with_masks(mixture, x, weights, experts)
    torch.testing.assert_close(ours, masks)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, masks)]
    torch.testing.assert_close(*gradients)


def test_all_rivals_are_measured(tmp_path):
    data, path = tmp_path / "pretrain_hq.jsonl", tmp_path / "moe.json"
    data.write_text(
        "".join(json.dumps({"text": "山水春天" * 40}) + "\n" for _ in range(60)), encoding="utf-8"
    )
    small = ["--hidden_size", "64", "--num_hidden_layers", "1", "--max_seq_len", "64", "--rows", "4"]
    assert main([*small, "--rounds", "2", "--data_path", str(data), "--json", str(path)]) == 0
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["command"] == (
        f"python -m benchmarks.moe_speed --data_path DATA_PATH {' '.join(small)} --rounds 2 --compile 0"
    )
    assert set(results["rivals"]) == {DENSE, OURS, MASKS}
    for found in results["rivals"].values():
        assert all(len(values) == 2 and min(values) > 0 for values in found.values())
    assert results["rivals"][DENSE]["tokens_per_cpu_s_of_dense"] == [1, 1]
