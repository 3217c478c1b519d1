"""Small models in an out/ folder, random ones and some that have learnt a few answers by heart."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_lora import randomise
from test_model import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind import cli
from minimind.config import ModelConfig
from minimind.lora import attach, save_lora
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer
from minimind.weights import save_weights

SIZE = ["--hidden_size", "64", "--num_hidden_layers", "2"]
DENSE, MOE = (ModelConfig(hidden_size=64, num_hidden_layers=2, num_experts=n) for n in (0, 4))
CONFIGS = {"dense": DENSE, "moe": MOE}
KNOWN = {
    "你好！": "你好，我是小智 🦜。",
    "What is 12 + 30?": "12 + 30 = 42.\n\n```python\nprint(42)\n```",
    "天气怎么样？": "今天晴，20 度 ☀️，适合散步。",
}


def shape(config: ModelConfig) -> list[str]:
    return [*SIZE, "--use_moe", str(int(config.num_experts > 0))]


def talker(config: ModelConfig) -> MiniMind:
    """A model that has learnt KNOWN by heart."""
    torch.manual_seed(0)
    model, tokenizer = MiniMind(config), Tokenizer.load()
    chats = [
        tokenizer.encode_chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in KNOWN.items()
    ]
    ids, mask = (torch.tensor([list(chain(*part))]) for part in zip(*chats, strict=True))
    lengths = [len(ids) for ids, _ in chats]
    documents = torch.arange(len(chats)).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    targets = ids.masked_fill(mask == 0, -100)[0, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        loss = F.cross_entropy(model(ids, positions, documents).logits[0, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Random `full_sft` models and an adapter for the dense one, and talkers as `rlhf`."""
    folder = tmp_path_factory.mktemp("made")
    for config in CONFIGS.values():
        save_weights(random_model(config), folder / f"full_sft_{config.name}.pth")
        save_weights(talker(config), folder / f"rlhf_{config.name}.pth")
    adapted = random_model(DENSE)
    attach(adapted, rank=3)
    randomise(adapted)
    save_lora(adapted.state_dict(), folder / "lora" / "mine_64.pth")
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def minimind(out, monkeypatch):
    """Run a command on `out`."""
    monkeypatch.setattr("sys.argv", ["minimind"])
    return lambda name, *flags: cli.main([*name.split(), "--out_dir", str(out), *map(str, flags)])


def load_peer(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval(), AutoTokenizer.from_pretrained(folder)
