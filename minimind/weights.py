"""Weight files: `out/{stage}_{hidden}[_moe].pth`, a plain fp16 state dict that says its own shape."""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minimind.config import PRESETS, ModelConfig
from minimind.errors import UserError
from minimind.files import atomic_write
from minimind.model import MiniMind
from minimind.runs import RUN, read_run, run_folder
from minimind.tokenizer import Tokenizer


def save_weights(model: MiniMind, path: Path) -> None:
    save_state(model.state_dict(), path)


def save_state(state: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a state dict, beside the target first, so that a crash leaves the old file whole."""
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: stored once
    atomic_write(path, lambda file: torch.save(state, file))


def load_state(path: Path, how_to_make: str) -> dict[str, Tensor]:
    """Read a state dict as data, never as code.

    Args: how_to_make: the command that makes the file, for the message when there is none.
    Raises: UserError when the file is missing, damaged or no state dict.
    """
    if not path.is_file():
        raise UserError(f"there are no weights at {path}; make them with: {how_to_make}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # PyTorch does not look at the checksums that it has written
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError):
        raise UserError(
            f"{path} is damaged, or not written by a training stage; copy it again or make it anew with: "
            f"{how_to_make}"
        ) from None
    if not isinstance(state, dict) or not all(map(is_weight, state, state.values())):
        raise UserError(f"{path} holds no state dict of tensors; expected a file that a stage wrote to out/")
    return state


def is_weight(name: object, value: object) -> bool:
    """Whether an entry of a file is a plain tensor of floating-point numbers under a name."""
    plain = isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()
    return isinstance(name, str) and plain


def infer_config(state: dict[str, Tensor], path: Path) -> ModelConfig:
    """The shape that a state dict belongs to.

    Every size but the number of heads stands in the tensors; all MiniMind models have two key/value heads,
    which gives the width of a head.
    """
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        key_size = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
        if not 0 < key_size <= hidden_size:
            raise ValueError(key_size)
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} holds no MiniMind model: it has no model.embed_tokens / k_proj") from None

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    shape = PRESETS["small"]
    try:
        return replace(
            shape,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=count(r"model\.layers\.(\d+)\."),
            num_attention_heads=hidden_size * shape.num_key_value_heads // key_size,
            num_experts=count(r"model\.layers\.0\.mlp\.experts\.(\d+)\."),
            num_shared_experts=count(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\."),
        )
    except UserError as error:
        raise UserError(f"{path} holds no MiniMind model: {error}") from None


def load_model(path: Path, how_to_make: str, expected: ModelConfig | None = None) -> MiniMind:
    """The model that a weight file holds, in fp32 on the CPU.

    Args: expected: the shape the caller needs; None takes whatever the file holds.
    Raises: UserError when the file is missing or damaged, or holds another shape than expected.
    """
    state = load_state(path, how_to_make)
    config = infer_config(state, path)
    if expected is not None:
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts"):
            found, wanted = getattr(config, field), getattr(expected, field)
            if found != wanted:
                raise UserError(
                    f"{path} holds a model with {field} {found}, but {wanted} was asked for; change the "
                    f"flags to fit the file, or make it anew with: {how_to_make}"
                )
        config = expected
    return fill_model(state, config, path)


def fill_model(state: dict[str, Tensor], config: ModelConfig, path: Path) -> MiniMind:
    """A model of the shape `config` with the weights in `state`, in fp32 on the CPU.

    Raises: UserError, naming `path`, when they do not fit it or are not finite.
    """
    # Files of the original also hold its rotation tables; they are computed here.
    state = {n: t.float() for n, t in state.items() if not n.endswith(("freqs_cos", "freqs_sin", "pos_cis"))}
    if "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    if len(state) < 9 * config.num_hidden_layers:  # before memory is taken for them
        layers = config.num_hidden_layers
        raise UserError(f"{path} lacks tensors of some of its {layers} layers; copy it again")
    model = MiniMind(config)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path} holds weights that are not numbers: its training diverged; train it again")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit a model of this shape: {reason[:200]}") from None
    return model


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Weights mean nothing under another tokenizer, even one of the same size.

    A run writes its tokenizer's fingerprint to `runs/{name}/run.json` beside the weights; weights that came
    without are taken as they are.

    Raises: UserError when the fingerprints differ.
    """
    if read_run(path).get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer ({run_folder(path) / RUN} has its fingerprint) than "
            f"the one in {tokenizer.path}; name that one with --tokenizer_path"
        )


def check_vocabulary(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises: UserError, naming `path`, when a model of the shape `config` has not as many tokens."""
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {config.vocab_size}, but the tokenizer in {tokenizer.path} has "
            f"{tokenizer.vocab_size}; name the right one with --tokenizer_path"
        )
