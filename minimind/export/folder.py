"""A model folder in Hugging Face's format: written for transformers and all that read like it, and read back.

Written to the files' formats, without the transformers package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.chat.options import SamplingOptions
from minimind.chat_template import with_marks
from minimind.errors import UserError
from minimind.export.huggingface import (
    minimind_config,
    minimind_state_dict,
    transformers_config,
    transformers_state_dict,
)
from minimind.files import atomic_folder
from minimind.model import MiniMind
from minimind.tokenizer import TRANSFORMERS_CONFIG, Tokenizer
from minimind.weights import fill_model, is_weight

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"


def write_folder(folder: Path, model: MiniMind, tokenizer: Tokenizer, dtype: str, card: str) -> None:
    """Write `folder` as a whole or not at all.

    Args: dtype: float32, bfloat16 or float16; card: the text of its README.md.
    Raises: UserError when it is there already, cannot be written, or `dtype` cannot hold a weight.
    """
    tensors = {
        name: cast(name, tensor, dtype)
        for name, tensor in transformers_state_dict(model.state_dict(), model.config).items()
    }
    texts = {
        CONFIG: as_json(config_json(model, dtype)),
        "generation_config.json": as_json(generation_config()),
        "README.md": card,
    }
    with atomic_folder(folder) as building:
        for name, text in (texts | tokenizer_files(tokenizer)).items():
            (building / name).write_text(text, encoding="utf-8")
        save_file(tensors, building / WEIGHTS, metadata={"format": "pt"})
        mode = (building / CONFIG).stat().st_mode
        (building / WEIGHTS).chmod(mode)  # safetensors leaves it to its writer alone


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    tensor = tensor.detach().to(getattr(torch, dtype)).contiguous()
    if not tensor.isfinite().all():
        raise UserError(f"--dtype {dtype} cannot hold a number in {name}; choose float32 or bfloat16")
    return tensor


def config_json(model: MiniMind, dtype: str) -> dict[str, Any]:
    """With two names for the older readers: transformers 4 knows no `rope_parameters` and no `dtype`."""
    older = {"rope_theta": model.config.rope_theta, "torch_dtype": dtype}
    return transformers_config(model.config) | {"dtype": dtype} | older


def generation_config() -> dict[str, Any]:
    """How our own chat draws an answer.

    Without its repetition penalty, which transformers would also hold against what the prompt says.
    """
    ours = SamplingOptions()
    return {
        "bos_token_id": Tokenizer.bos_id,
        "eos_token_id": [Tokenizer.eos_id, Tokenizer.pad_id],  # both end an answer here too
        "pad_token_id": Tokenizer.pad_id,
        "do_sample": True,
        "temperature": ours.temperature,
        "top_p": ours.top_p,
        "top_k": ours.top_k or 0,
    }


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files that `AutoTokenizer` reads, by name."""
    config = TRANSFORMERS_CONFIG
    if (path := tokenizer.path / "tokenizer_config.json").exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("chat_template", None)  # it goes to a file of its own
    config = {"model_input_names": ["input_ids", "attention_mask"]} | config  # transformers 4 adds one more
    files = {"tokenizer.json": tokenizer.tokenizer_json, "tokenizer_config.json": as_json(config)}
    if tokenizer.chat_template:
        files["chat_template.jinja"] = with_marks(tokenizer.chat_template)
    return files


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_folder(folder: Path) -> MiniMind:
    """The model in `folder`, in fp32 on the CPU.

    Raises: UserError when files are missing or damaged, or the model is one that MiniMind cannot express.
    """
    found = read_json(folder / CONFIG, "name a folder that save_pretrained or `minimind export hf` wrote")
    config = minimind_config(found, folder / CONFIG)
    tensors = read_tensors(folder)
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("model.embed_tokens.weight")
    same = head is not None and embedding is not None and torch.equal(head, embedding)
    if not (found.get("tie_word_embeddings") or same):
        raise UserError(f"{folder} holds a model that MiniMind cannot express: its embeddings are not tied")
    try:
        state = minimind_state_dict(tensors, config)
    except (IndexError, RuntimeError, ValueError):
        raise UserError(f"{folder} does not fit a model of this shape: its experts are of another") from None
    return fill_model(state, config, folder)


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Raises: UserError when `path` is missing (then with `mend`), or holds no JSON object."""
    if not path.is_file():
        raise UserError(f"there is no {path}; {mend}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; copy it again")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or several.

    Raises: UserError when there are none, or a file is missing or damaged.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / SHARDS).is_file():
        places = read_json(folder / SHARDS, "").get("weight_map")
        if not isinstance(places, dict) or not all(map(is_file_name, places.values())):
            raise UserError(f"{folder / SHARDS} is damaged; copy it again")
        names = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_tensor_file(folder / name, "pytorch_model.bin", "save_pretrained")
    if not all(map(is_weight, tensors, tensors.values())):
        raise UserError(
            f"{folder} holds tensors that are no real numbers; import the model as it was trained"
        )
    return tensors


def read_tensor_file(path: Path, pickle: str, writer: str) -> dict[str, Tensor]:
    """Raises: UserError when `path` is damaged, or missing: then with what `writer` has perhaps left instead,
    the file `pickle`.
    """
    if not path.is_file():
        pickled = path.with_name(pickle).is_file()
        reason = f"{pickle} is a pickle, which can run code, and is not read; " if pickled else ""
        raise UserError(f"there is no {path}; {reason}write it with {writer}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None


def is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
