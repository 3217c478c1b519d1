"""MiniMind as transformers knows it: which architecture it is, and under which names its weights go.

A dense model is `LlamaForCausalLM` as it stands. A mixture of experts is `GraniteMoeSharedForCausalLM` with
every multiplier at 1; Granite keeps an expert's gate and up projections in one tensor, and all experts of a
layer in one.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from minimind.config import ModelConfig


def transformers_config(config: ModelConfig) -> dict:
    """The content of `config.json`, as keyword arguments of the architecture's configuration class."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "yarn"} | asdict(config.rope_scaling)
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not config.num_experts:
        return {"model_type": "llama"} | shared
    return {
        "model_type": "granitemoeshared",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "shared_intermediate_size": config.num_shared_experts * config.intermediate_size,
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    } | shared


def transformers_state_dict(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under transformers' names. The tied `lm_head.weight` is left to tie itself."""
    state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    if not config.num_experts:
        return state

    def gate_and_up(*prefixes: str) -> Tensor:  # (2 · FFN, H), FFN counting all of `prefixes`
        return torch.cat([state.pop(f"{p}.{part}_proj.weight") for part in ("gate", "up") for p in prefixes])

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        experts = [f"{block}.mlp.experts.{i}" for i in range(config.num_experts)]
        shared = [f"{block}.mlp.shared_experts.{i}" for i in range(config.num_shared_experts)]
        moe = f"{block}.block_sparse_moe"
        state[f"{moe}.router.layer.weight"] = state.pop(f"{block}.mlp.gate.weight")
        state[f"{moe}.input_linear.weight"] = torch.stack([gate_and_up(e) for e in experts])
        state[f"{moe}.output_linear.weight"] = torch.stack(
            [state.pop(f"{e}.down_proj.weight") for e in experts]
        )
        # Granite has one shared expert: a sum of SwiGLUs is one as wide as all of them.
        state[f"{block}.shared_mlp.input_linear.weight"] = gate_and_up(*shared)
        state[f"{block}.shared_mlp.output_linear.weight"] = torch.cat(
            [state.pop(f"{s}.down_proj.weight") for s in shared], dim=1
        )
    return state
