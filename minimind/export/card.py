"""The model card of an exported folder: what it is, what it was trained on, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minimind.model import MiniMind
from minimind.runs import read_run
from minimind.tokenizer import Tokenizer

CARD = """\
---
license: apache-2.0
language:
- zh
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- minimind
---

# {title}

用 MiniMind 从零训练的中英文小语言模型。
A small Chinese/English language model, trained from zero with MiniMind.

| | |
|---|---|
{table}

## 使用 · Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{example}
answer = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

No code of its own is needed, and no `trust_remote_code`. `vllm serve FOLDER` serves it.

## 许可 · License

MiniMind 与这里的文件以 Apache-2.0 发布。模型是从训练数据里学来的：公开之前请确认数据的许可允许。
MiniMind and the files here are under Apache-2.0. What the model knows comes from its training data: see that
its terms allow it before you publish.
"""
CHAT = """\
messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
CONTINUE = """\
# It continues texts; it has not learned to answer.
inputs = tokenizer("<|im_start|>人工智能", return_tensors="pt")"""


def card(
    model: MiniMind,
    tokenizer: Tokenizer,
    dtype: str,
    weights: Path,
    adapters: Sequence[str],
    architecture: str,
) -> str:
    """The text of README.md for `weights` with `adapters` merged in; their run.json tells the rest."""
    config, run = model.config, read_run(weights)
    rows = {
        "architecture": f"`{architecture}`",
        "parameters": f"{model.num_parameters / 1e6:.2f} M",
        "hidden size, layers": f"{config.hidden_size}, {config.num_hidden_layers}",
        "attention heads, key/value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "feed-forward width": str(config.intermediate_size),
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_position_embeddings:,}",
        "numbers": dtype,
        "weights": f"`{weights.name}`",
        "tokenizer fingerprint": f"`{tokenizer.fingerprint}`",
    }
    if config.num_experts:
        chosen, shared = config.num_experts_per_tok, config.num_shared_experts
        rows["experts"] = f"{config.num_experts}, {chosen} for each token, and {shared} shared"
    if adapters:
        rows["adapters merged in"] = ", ".join(f"`{name}`" for name in adapters)
    for name, key in (
        ("stage", "stage"),
        ("SHA-256 of the training data", "data_sha256"),
        ("optimizer steps", "total_steps"),
    ):
        if isinstance(run.get(key), str | int):
            rows[name] = f"`{run[key]}`"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    example = CONTINUE if weights.name.startswith("pretrain_") else CHAT
    return CARD.format(title=f"MiniMind {weights.stem}", table=table, example=example)
