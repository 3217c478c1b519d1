"""`minimind export hf`, `minimind import hf` and `minimind import pth`: whole models out, and back in."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.chat.loading import MODES
from minimind.errors import UserError
from minimind.export.options import WeightOptions
from minimind.flags import REQUIRED, flag, parse_flags
from minimind.paths import OUT_DIR


@dataclass(frozen=True)
class HFOptions(WeightOptions):
    folder: Path = flag(REQUIRED, "folder to write", positional=True)
    # Small models have room for it. Nothing is rounded then, merged adapters included; programs that
    # fine-tune start from full precision (steps in fp16 vanish or overflow), and servers choose their own.
    dtype: str = flag("float32", "numbers of the weights", choices=("float32", "bfloat16", "float16"))


def export(argv: Sequence[str] | None = None) -> int:
    """Write a model as a Hugging Face folder: for transformers, TRL, PEFT, vLLM and others.

    A dense model is LlamaForCausalLM, a mixture of experts GraniteMoeSharedForCausalLM.

        minimind export hf hf/
        minimind export hf hf/ --from_weight rlhf --dtype bfloat16
    """
    options = parse_flags(HFOptions, argv, inspect.getdoc(export))
    from minimind.files import refuse_to_replace

    refuse_to_replace(options.folder)
    from minimind.export.card import card
    from minimind.export.folder import write_folder
    from minimind.export.huggingface import transformers_config

    model, tokenizer = options.load()
    architecture = transformers_config(model.config)["architectures"][0]
    text = card(model, tokenizer, options.dtype, options.weights, options.lora_name, architecture)
    write_folder(options.folder, model, tokenizer, options.dtype, text)
    print(f"{options.folder}: {options.title} as {architecture}, {options.dtype}")
    return 0


@dataclass(frozen=True)
class ImportOptions:
    source: Path = flag(REQUIRED, "what to read", positional=True)
    out_dir: Path = flag(OUT_DIR, "folder of the weight files")
    stage: str = flag("full_sft", "stage it shall count as, the first part of its name", choices=MODES)
    tokenizer_path: Path | None = flag(
        None, "folder of its tokenizer.json; without it the one beside it, or else the shipped one"
    )


def import_hf(argv: Sequence[str] | None = None) -> int:
    """Read a model from a Hugging Face folder: one that `minimind export hf` wrote, as it was or trained on.

    Safetensors only. A model that MiniMind cannot express is refused with the reason.

        minimind import hf hf/ --stage rlhf                       writes out/rlhf_512.pth
    """
    options = parse_flags(ImportOptions, argv, inspect.getdoc(import_hf))
    from minimind.export.folder import read_folder
    from minimind.export.incoming import keep

    return keep(read_folder(options.source), options.source, options)


def import_pth(argv: Sequence[str] | None = None) -> int:
    """Read a weight file (.pth) from elsewhere.

    Those that MiniMind2 published are such files. They are read as data, never as code.

        minimind import pth full_sft_512.pth                      writes out/full_sft_512.pth
    """
    options = parse_flags(ImportOptions, argv, inspect.getdoc(import_pth))
    from minimind.export.incoming import keep
    from minimind.weights import load_model

    if not options.source.is_file():
        raise UserError(f"there is no {options.source}; name a .pth file")
    model = load_model(options.source, "the program that it comes from")
    return keep(model, options.source.parent, options)
