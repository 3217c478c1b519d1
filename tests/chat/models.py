"""Small models for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from minimind.config import ModelConfig, YarnScaling
from minimind.model import MiniMind
from minimind.weights import save_weights

SHORT = ["--max_new_tokens", "6", "--device", "cpu"]  # of `eval_model.py`
DENSE = ModelConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300)
MOE = replace(DENSE, num_experts=4)
YARN = replace(DENSE, rope_scaling=YarnScaling(factor=4, original_max_position_embeddings=16))
SHAPES = {"dense": DENSE, "moe": MOE, "yarn": YARN}


def random_model(config: ModelConfig = DENSE, seed: int = 0) -> MiniMind:
    """Weights that are wide enough for answers to differ."""
    torch.manual_seed(seed)
    model = MiniMind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


def save_random(path: Path, **shape) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 1}
    model = MiniMind(replace(ModelConfig(), **small | shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, path)
