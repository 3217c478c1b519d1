"""A model that comes from elsewhere, kept under our names beside what says which tokenizer it needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from minimind.errors import UserError
from minimind.export.folder import tokenizer_files
from minimind.files import atomic_write, refuse_to_replace
from minimind.model import MiniMind
from minimind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minimind.export.hf_cli import ImportOptions

# What any of our models has seen the like of.
ORDINARY = (
    "今天天气很好，我们去公园散步，回来的时候买了一些水果。",
    "人工智能是计算机科学的一个分支，它研究怎样让机器完成需要智能的工作。",
    "The weather is fine today, so we went for a walk in the park and bought some fruit.",
)


def keep(model: MiniMind, folder: Path, options: ImportOptions) -> int:
    """Write `model`, read from `folder`, to out_dir, and tell how to use it. Returns the exit code 0.

    Raises: UserError when there are weights of that name, or the tokenizer is not of its size.
    """
    target = options.out_dir / f"{options.stage}_{model.config.name}.pth"
    refuse_to_replace(target)
    tokenizer = tokenizer_of(folder, options.tokenizer_path)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{options.source} has a vocabulary of {model.config.vocab_size}, but the tokenizer in "
            f"{tokenizer.path} has {tokenizer.vocab_size}; name the right one with --tokenizer_path"
        )
    run_dir = target.parent / "runs" / target.stem
    shipped = tokenizer.fingerprint == Tokenizer.load().fingerprint
    if not shipped:
        for name, text in tokenizer_files(tokenizer).items():
            write_text(run_dir / "tokenizer" / name, text)
        tokenizer = Tokenizer.load(run_dir / "tokenizer")
    run = {"tokenizer_fingerprint": tokenizer.fingerprint, "imported": str(options.source)}
    write_text(run_dir / "run.json", json.dumps(run, indent=2, ensure_ascii=False))
    state = {name: tensor.to(exact_dtype(model)) for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: stored once
    atomic_write(target, lambda file: torch.save(state, file))

    print(f"{target}: {model.num_parameters / 1e6:.2f} M parameters from {options.source}")
    if not shipped:
        print(f"with a tokenizer of its own: give every command --tokenizer_path {tokenizer.path}")
    nats, guessing = nats_per_token(model, tokenizer), math.log(tokenizer.vocab_size)
    if nats > guessing:
        print(
            f"warning: on ordinary sentences it does worse ({nats:.1f} nats a token) than guessing "
            f"({guessing:.1f}); was it trained with another tokenizer? Import it again with --tokenizer_path"
        )
    return 0


def tokenizer_of(folder: Path, named: Path | None) -> Tokenizer:
    """The tokenizer named, or the one in `folder`, or the shipped one: also in place of a mere copy of it.

    A copy gets other white space and a list of settings when transformers saves it, and is the same still.
    """
    shipped = Tokenizer.load()
    if named is None and not (folder / "tokenizer.json").is_file():
        return shipped
    found = Tokenizer.load(named or folder)
    return shipped if meaning(found) == meaning(shipped) else found


def meaning(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides about ids: all of tokenizer.json but how batches are cut and filled, and the chat format."""
    content = json.loads(tokenizer.tokenizer_json)
    probe = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    template = tokenizer.render_chat(probe, True) if tokenizer.chat_template else ""
    return content | {"truncation": None, "padding": None, "chat": template}


def exact_dtype(model: MiniMind) -> torch.dtype:
    """fp16, as our weight files are, unless that would round a number."""
    exact = all(torch.equal(p.half().float(), p) for p in model.parameters())
    return torch.float16 if exact else torch.float32


@torch.inference_mode()
def nats_per_token(model: MiniMind, tokenizer: Tokenizer) -> float:
    """Mean loss on a few sentences; a model that reads foreign ids is sure of the wrong ones."""
    losses = []
    for text in ORDINARY:
        ids = torch.tensor([tokenizer.encode_document(text)])
        losses.append(F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode()))
