"""`minimind export gguf` and `minimind export ollama`: a model for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.errors import UserError
from minimind.export.options import WeightOptions
from minimind.flags import flag, parse_flags

# f16 is what weight files hold: nothing is rounded.
DTYPE = "numbers of the matrices; q8_0 takes half the room of f16"
DTYPES = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class GGUFOptions(WeightOptions):
    file: Path | None = flag(None, "file to write", positional=True)
    dtype: str = flag("f16", DTYPE, choices=DTYPES)


@dataclass(frozen=True)
class OllamaOptions(WeightOptions):
    folder: Path | None = flag(None, "folder to write", positional=True)
    dtype: str = flag("f16", DTYPE, choices=DTYPES)


def export(argv: Sequence[str] | None = None) -> int:
    """Write a model as a GGUF file, for llama.cpp, LM Studio and others."""
    options = parse_flags(GGUFOptions, argv, export.__doc__)
    from minimind.files import atomic_write, refuse_to_replace

    if options.file is None:
        raise UserError("name the file to write: minimind export gguf FILE")
    refuse_to_replace(options.file)
    from minimind.export.gguf import gguf_writer, write

    model, tokenizer = options.load()
    writer = gguf_writer(model, tokenizer, options.dtype, options.title)
    atomic_write(options.file, lambda file: write(writer, Path(file.name)))  # it opens the file itself
    size = options.file.stat().st_size / 1e6
    print(f"{options.file}: {options.title}, {options.dtype}, {size:.1f} MB")
    return 0


def export_ollama(argv: Sequence[str] | None = None) -> int:
    """Write a folder with a GGUF file and a Modelfile, for `ollama create NAME -f FOLDER/Modelfile`."""
    options = parse_flags(OllamaOptions, argv, export_ollama.__doc__)
    from minimind.files import refuse_to_replace

    if options.folder is None:
        raise UserError("name the folder to write: minimind export ollama FOLDER")
    refuse_to_replace(options.folder)
    from minimind.export.ollama import write_ollama

    model, tokenizer = options.load()
    write_ollama(options.folder, model, tokenizer, options.dtype, options.title)
    print(f"{options.folder}: {options.title}, {options.dtype}")
    print(f"ollama create minimind -f {options.folder}/Modelfile")
    return 0
