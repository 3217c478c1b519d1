"""MiniMind as transformers knows it: which architecture it is, and under which names its weights go.

A dense model is `LlamaForCausalLM` as it stands. A mixture of experts is `GraniteMoeSharedForCausalLM` with
every multiplier at 1; Granite keeps an expert's gate and up projections in one tensor, and all experts of a
layer in one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.config import ModelConfig
from minimind.errors import UserError


def transformers_config(config: ModelConfig) -> dict[str, Any]:
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
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not config.num_experts:
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False} | shared
    return {
        "model_type": "granitemoeshared",
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "num_local_experts": config.num_experts,
        "num_experts": config.num_experts,  # the name by which TRL's balance loss asks for it
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
        experts, shared = expert_names(config, layer)
        moe, shared_mlp = granite_names(layer)
        state[f"{moe}.router.layer.weight"] = state.pop(f"model.layers.{layer}.mlp.gate.weight")
        state[f"{moe}.input_linear.weight"] = torch.stack([gate_and_up(e) for e in experts])
        state[f"{moe}.output_linear.weight"] = torch.stack(
            [state.pop(f"{e}.down_proj.weight") for e in experts]
        )
        # Granite has one shared expert: a sum of SwiGLUs is one as wide as all of them.
        state[f"{shared_mlp}.input_linear.weight"] = gate_and_up(*shared)
        state[f"{shared_mlp}.output_linear.weight"] = torch.cat(
            [state.pop(f"{s}.down_proj.weight") for s in shared], dim=1
        )
    return state


def minimind_state_dict(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back: transformers' state dict under our names. A tensor it lacks is missing here too."""
    state = dict(state)

    def put(names: list[str], tensors: tuple[Tensor, ...]) -> None:
        state.update(zip(names, tensors, strict=True))

    for layer in range(config.num_hidden_layers if config.num_experts else 0):
        experts, shared = expert_names(config, layer)
        moe, shared_mlp = granite_names(layer)
        if (router := state.pop(f"{moe}.router.layer.weight", None)) is not None:
            state[f"model.layers.{layer}.mlp.gate.weight"] = router
        if (both := state.pop(f"{moe}.input_linear.weight", None)) is not None:  # (E, 2 · FFN, H)
            for part, half in zip(("gate", "up"), both.chunk(2, dim=1), strict=True):
                put([f"{e}.{part}_proj.weight" for e in experts], half.unbind())
        if (down := state.pop(f"{moe}.output_linear.weight", None)) is not None:  # (E, H, FFN)
            put([f"{e}.down_proj.weight" for e in experts], down.unbind())
        if (both := state.pop(f"{shared_mlp}.input_linear.weight", None)) is not None:
            for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                put([f"{s}.{part}_proj.weight" for s in shared], half.chunk(len(shared)))
        if (down := state.pop(f"{shared_mlp}.output_linear.weight", None)) is not None:
            put([f"{s}.down_proj.weight" for s in shared], down.chunk(len(shared), dim=1))
    return state


def expert_names(config: ModelConfig, layer: int) -> tuple[list[str], list[str]]:
    """A layer's routed experts and its shared ones, as we call them."""
    mlp = f"model.layers.{layer}.mlp"
    return (
        [f"{mlp}.experts.{i}" for i in range(config.num_experts)],
        [f"{mlp}.shared_experts.{i}" for i in range(config.num_shared_experts)],
    )


def granite_names(layer: int) -> tuple[str, str]:
    """A layer's mixture and its shared expert, as Granite calls them."""
    return f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.shared_mlp"


# What a configuration means where it is silent, by transformers' classes.
SILENT = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
GRANITE_SIZES = ("num_local_experts", "shared_intermediate_size")


def minimind_config(found: dict[str, Any], source: Path) -> ModelConfig:
    """The shape that the content of a `config.json` describes.

    Our weight files hold tensors and no settings: all that is not a tensor's size must be as it is in every
    MiniMind.

    Raises: UserError that names what is missing, or what our architecture does not have.
    """
    kind = found.get("model_type")
    if kind == "minimind":
        raise UserError(
            f"{source} is of MiniMind2's own format; import its weight file alone: minimind import pth FILE"
        )
    if kind not in ("llama", "granitemoeshared"):
        raise UserError(
            f"{source} describes a model of type {kind!r}; MiniMind is a llama or, as a mixture of experts, "
            "a granitemoeshared, and can read no other"
        )
    for name in SIZES + (GRANITE_SIZES if kind == "granitemoeshared" else ()):
        if type(found.get(name)) is not int or not 0 < found[name] < 2**24:
            raise UserError(f"{source} is damaged: its {name} is {found.get(name)!r}, and should be a size")
    positions = found.get("max_position_embeddings", 2048)
    if type(positions) is not int or not 0 < positions < 2**24:
        raise UserError(f"{source} is damaged: its max_position_embeddings is {positions!r}")
    heads, width = found["num_attention_heads"], found["hidden_size"]
    strange = [] if heads % 2 == 0 and width % (2 * heads) == 0 else [f"hidden_size {width} in {heads} heads"]
    if not strange:
        config = ModelConfig(
            vocab_size=found["vocab_size"],
            hidden_size=width,
            num_hidden_layers=found["num_hidden_layers"],
            num_attention_heads=heads,
            max_position_embeddings=positions,
            num_experts=found["num_local_experts"] if kind == "granitemoeshared" else 0,
        )
        if config.num_experts:
            shared = found["shared_intermediate_size"] // config.intermediate_size
            config = replace(config, num_shared_experts=max(1, shared))
        strange = differences(found, config)
        if 0 < config.num_experts < config.num_experts_per_tok:
            strange.append(f"num_local_experts {config.num_experts}")
    if strange:
        raise UserError(f"{source} describes a model that MiniMind cannot express: {', '.join(strange)}")
    return config


def differences(found: dict[str, Any], config: ModelConfig) -> list[str]:
    """Where the settings in `found` are not those of every MiniMind, in words."""
    ours = transformers_config(config) | {"head_dim": config.head_dim}
    silent = SILENT | {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
    }
    checked = {"intermediate_size", "shared_intermediate_size", *silent} & ours.keys()
    theirs = {name: silent.get(name) if found.get(name) is None else found[name] for name in checked}

    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    ours |= {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0}
    silent_rope = {"rope_type": rope.get("type", "default"), "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    theirs |= {name: rope.get(name, found.get(name, value)) for name, value in silent_rope.items()}
    if found.get("quantization_config"):
        theirs["quantization_config"] = "set"
    return [
        f"{name} {value!r} instead of {ours.get(name)!r}"
        for name, value in sorted(theirs.items())
        if not same(value, ours.get(name))
    ]


def same(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b
