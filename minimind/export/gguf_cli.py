"""`minimind export gguf` and `minimind export ollama`: a model for llama.cpp and what is built on it."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minimind.export.options import WeightOptions
from minimind.flags import REQUIRED, flag, parse_flags

# f16 is what weight files hold: nothing is rounded.
DTYPE = "numbers of the matrices; q8_0 takes half the room of f16"
DTYPES = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class GGUFOptions(WeightOptions):
    file: Path = flag(REQUIRED, "file to write", positional=True)
    dtype: str = flag("f16", DTYPE, choices=DTYPES)


@dataclass(frozen=True)
class OllamaOptions(WeightOptions):
    folder: Path = flag(REQUIRED, "folder to write", positional=True)
    dtype: str = flag("f16", DTYPE, choices=DTYPES)


def export(argv: Sequence[str] | None = None) -> int:
    """Write a model as a GGUF file.

    llama.cpp, LM Studio and others read it.

        minimind export gguf minimind.gguf
        minimind export gguf medical.gguf --lora_name lora_medical --dtype q8_0
    """
    options = parse_flags(GGUFOptions, argv, inspect.getdoc(export))
    from minimind.files import atomic_write, refuse_to_replace, shown_size

    refuse_to_replace(options.file)
    from minimind.export.gguf import gguf_writer, write

    model, tokenizer = options.load()
    writer = gguf_writer(model, tokenizer, options.dtype, options.title)

    def write_new(file: BinaryIO) -> None:
        write(writer, Path(file.name))  # it opens the file itself
        refuse_to_replace(options.file)  # another process may have been faster

    atomic_write(options.file, write_new)
    size = shown_size(options.file.stat().st_size)
    print(f"{options.file}: {options.title}, {options.dtype}, {size}")
    return 0


def export_ollama(argv: Sequence[str] | None = None) -> int:
    """Write a folder for ollama.

    It has a GGUF file and a Modelfile, for `ollama create NAME -f FOLDER/Modelfile`.

        minimind export ollama ollama/
    """
    options = parse_flags(OllamaOptions, argv, inspect.getdoc(export_ollama))
    from minimind.files import refuse_to_replace

    refuse_to_replace(options.folder)
    from minimind.export.ollama import write_ollama

    model, tokenizer = options.load()
    write_ollama(options.folder, model, tokenizer, options.dtype, options.title)
    print(f"{options.folder}: {options.title}, {options.dtype}")
    print(f"ollama create minimind -f {shlex.quote(str(options.folder / 'Modelfile'))}")
    return 0
