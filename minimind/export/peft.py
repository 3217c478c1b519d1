"""LoRA adapters as PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT multiplies an adapter by lora_alpha / r; ours have scale 1. On the way out alpha is therefore r, on the
way in the scale is multiplied into B. Written to the files' format, without the peft package.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from minimind.errors import UserError
from minimind.export.folder import read_tensor_file
from minimind.files import atomic_folder
from minimind.lora import adapter_ranks, check_fits
from minimind.model import MiniMind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper around the model, in the names of its tensors

# An adapter is no more than B A beside a projection only where these are unset.
NOT_PLAIN = (
    "use_dora",
    "bias",
    "modules_to_save",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
)
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the frozen weights too


def export_peft(state: dict[str, Tensor], folder: Path, base_model: str | None = None) -> None:
    """Write adapters for the `LlamaForCausalLM` (or Granite) that holds the same weights.

    Args:
        state: as `lora.read_adapters` gives it.
        base_model: name or folder of that model, for tools that load it themselves.
    Raises: UserError for adapters of a mixture's experts, or when the folder cannot be written.
    """
    expert = next((name.split(".lora.")[0] for name in state if "experts." in name), None)
    if expert:
        raise UserError(
            f"the adapter of {expert} cannot be written in PEFT's format, since Granite keeps all experts of "
            "a layer in one tensor; add it to the weights instead: minimind merge"
        )
    rank_of = adapter_ranks(state)
    rank = Counter(rank_of.values()).most_common(1)[0][0]
    others = {name: r for name, r in rank_of.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-1] for name in rank_of}),
    }
    tensors = {
        PREFIX + re.sub(r"\.lora\.([AB])\.", r".lora_\1.", name): tensor.contiguous()
        for name, tensor in state.items()
    }
    with atomic_folder(folder) as building:
        (building / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (building / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def import_peft(folder: Path, model: MiniMind) -> dict[str, Tensor]:
    """The adapters in a PEFT folder under our names, in fp32, found to fit `model`.

    Raises: UserError when files are missing or damaged, hold more than plain LoRA, or do not fit.
    """
    config = read_config(folder / CONFIG)
    tensors = read_tensor_file(folder / WEIGHTS, "adapter_model.bin", "PEFT's save_pretrained")
    state = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise UserError(
                f"{folder / WEIGHTS} holds {name}, and only plain LoRA of projections can be read"
            )
        state[f"{match[1]}.lora.{match[2]}.weight"] = tensor.float()
    check_fits(state, model, folder / WEIGHTS, "python trainer/train_lora.py")
    try:
        scales = {place: scale(config, place, rank) for place, rank in adapter_ranks(state).items()}
    except (ValueError, TypeError, AttributeError, re.error):
        raise UserError(
            f"{folder / CONFIG} is damaged: its lora_alpha or alpha_pattern is no number"
        ) from None
    for place, factor in scales.items():
        state[f"{place}.lora.B.weight"] *= factor
    return state


def scale(config: dict[str, Any], place: str, rank: int) -> float:
    """alpha / r for one projection; alpha / √r if rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alphas = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", place))
    alpha = float(next(alphas, config["lora_alpha"]))
    if not math.isfinite(alpha):
        raise ValueError(alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path.parent} is no PEFT adapter: it has no {path.name}; name another with --peft_dir"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
        float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged, or not of a LoRA adapter; copy it again") from None
    unusual = [name for name in NOT_PLAIN if config.get(name) not in (None, False, [], "none")]
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        unusual.append("init_lora_weights")
    if kind != "LORA":
        unusual.append("peft_type")
    if unusual:
        found = ", ".join(f"{name} {config[name]!r}" for name in unusual)
        raise UserError(f"{path} has {found}, and only plain LoRA can be read")
    return config
