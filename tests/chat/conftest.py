"""Small weights of all stages, as training leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minimind.config import ModelConfig
from minimind.lora import attach, save_lora
from minimind.model import MiniMind

from .models import save_random


def save_adapter(path: Path) -> None:
    """For the model of `full_sft_64.pth`."""
    model = MiniMind(ModelConfig(hidden_size=64, num_hidden_layers=2))
    attach(model, rank=2)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_lora(model.state_dict(), path)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Weights of all stages. Names give the shape that `find_weights` looks for."""
    folder = tmp_path_factory.mktemp("out")
    for stage in ("pretrain", "rlhf", "reason", "full_dist"):
        save_random(folder / f"{stage}_64.pth")
    save_random(folder / "full_sft_64.pth", num_hidden_layers=2)
    for name in ("lora_medical", "my_identity"):
        save_adapter(folder / "lora" / f"{name}_64.pth")
    return folder
