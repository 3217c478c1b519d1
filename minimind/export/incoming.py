"""A model that comes from elsewhere, kept under our names beside what says which tokenizer it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimind.chat_template import with_marks, without_marks
from minimind.errors import UserError
from minimind.export.folder import tokenizer_files
from minimind.files import write_text
from minimind.model import MiniMind
from minimind.runs import RUN, run_folder
from minimind.tokenizer import Tokenizer
from minimind.weights import check_vocabulary, save_state

if TYPE_CHECKING:
    from minimind.export.hf_cli import ImportOptions


def keep(model: MiniMind, folder: Path, options: ImportOptions) -> int:
    """Write `model`, read from `folder`, to out_dir, and tell how to use it. Returns the exit code 0.

    Raises: UserError when there are weights of that name, or the tokenizer is not of its size.
    """
    target = options.out_dir / f"{options.stage}_{model.config.name}.pth"
    run_dir = run_folder(target)
    if target.exists() or (run_dir / "checkpoints").exists():
        raise UserError(f"{target} or its run exists already; choose another --stage or --out_dir")
    tokenizer = tokenizer_of(folder, options.tokenizer_path)
    check_vocabulary(options.source, model.config, tokenizer)
    shipped = tokenizer.fingerprint == Tokenizer.load().fingerprint
    flaw = None if shipped or options.stage == "pretrain" else template_flaw(tokenizer)
    if not shipped:
        for name, text in tokenizer_files(tokenizer).items():
            write_text(run_dir / "tokenizer" / name, text)
        tokenizer = Tokenizer.load(run_dir / "tokenizer")
    run = {"tokenizer_fingerprint": tokenizer.fingerprint, "imported": str(options.source)}
    write_text(run_dir / RUN, json.dumps(run, indent=2, ensure_ascii=False))
    save_state(model.state_dict(), target, exact_dtype(model))

    print(f"{target}: {model.num_parameters / 1e6:.2f} M parameters from {options.source}")
    if not shipped:
        print(f"it has a tokenizer of its own: give every command --tokenizer_path {tokenizer.path}")
    elif not (folder / "tokenizer.json").is_file() and not options.tokenizer_path:
        print("no tokenizer came with it, so it counts as trained with the shipped one; MiniMind2's weights")
        print(f"were not: delete {target} and import them again with --tokenizer_path")
    if flaw:
        print(f"{flaw}; mend it there, delete {target} and import it again")
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
    """What decides about ids here: tokenizer.json without what is done around a text, and the chat format."""
    around = dict.fromkeys(("truncation", "padding", "post_processor"))
    probe = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    try:
        chat = tokenizer.render_chat(probe, add_generation_prompt=True)
    except UserError:  # it has no template, or one that knows no system message
        chat = tokenizer.chat_template
    return json.loads(tokenizer.tokenizer_json) | around | {"chat": chat}


def template_flaw(tokenizer: Tokenizer) -> str | None:
    """What a chat template from elsewhere fails at: at answers, or at marking them for those who train on."""
    try:
        tokenizer.render_chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
    except UserError as error:
        return f"it cannot chat: {error}"
    marked = with_marks(tokenizer.chat_template)
    if without_marks(marked) == marked:
        return (
            f"the chat template in {tokenizer.path} has no {{% generation %}} around answers: MiniMind knows "
            "them all the same, but TRL's assistant_only_loss will not in an export of this model"
        )
    return None


def exact_dtype(model: MiniMind) -> torch.dtype:
    """fp16, as our weight files are, unless that would round a number."""
    exact = all(torch.equal(p.half().float(), p) for p in model.parameters())
    return torch.float16 if exact else torch.float32
