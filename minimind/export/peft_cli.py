"""`minimind export peft` and `minimind import peft`: adapters on their way to and from PEFT."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.chat.loading import ShapeOptions
from minimind.flags import flag, parse_flags
from minimind.stages.lora import check_name

if TYPE_CHECKING:
    from minimind.config import ModelConfig
    from minimind.model import MiniMind


@dataclass(frozen=True)
class PeftOptions(ShapeOptions):
    lora_name: str = flag("lora_medical", "name of the adapter")
    peft_dir: Path | None = flag(None, "PEFT's folder; without it peft/ in out_dir")

    def __post_init__(self) -> None:
        check_name(self.lora_name)

    def model(self) -> MiniMind:
        """The model that the adapter belongs to, without its weights, to hold the adapter against."""
        import torch

        from minimind.model import MiniMind
        from minimind.weights import infer_config, load_state

        path = self.find_weights(sys.stderr)
        with torch.device("meta"):
            return MiniMind(infer_config(load_state(path, self.how_to_make), path))

    def folder(self, config: ModelConfig) -> Path:
        return self.peft_dir or self.out_dir / "peft" / f"{self.lora_name}_{config.name}"


@dataclass(frozen=True)
class ExportOptions(PeftOptions):
    base_model: str | None = flag(
        None, "name or folder of the model in transformers' format, to be noted there"
    )


def export(argv: Sequence[str] | None = None) -> int:
    """Write an adapter as a PEFT folder.

    PEFT then loads it beside the base model in transformers' format.

        minimind export peft --lora_name lora_identity                   writes out/peft/lora_identity_512/
        minimind export peft --lora_name lora_identity --base_model FOLDER     which its base model is in
    """
    options = parse_flags(ExportOptions, argv, inspect.getdoc(export))
    from minimind.export import peft
    from minimind.files import refuse_to_replace
    from minimind.lora import read_adapters

    model = options.model()
    path, folder = options.adapter_path(options.lora_name, model.config), options.folder(model.config)
    refuse_to_replace(folder, "choose another --peft_dir or move it")
    state = read_adapters(path, model, options.how_to_adapt(model.config))
    peft.export_peft(state, folder, options.base_model)
    print(f"{folder}: {path.name} for PEFT")
    return 0


def import_(argv: Sequence[str] | None = None) -> int:
    """Read an adapter from a PEFT folder.

    That must be a plain LoRA adapter, in safetensors; its rank may differ from one projection to the other.

        minimind import peft --lora_name theirs --peft_dir FOLDER        writes out/lora/theirs_512.pth
    """
    options = parse_flags(PeftOptions, argv, inspect.getdoc(import_))
    import torch

    from minimind.export import peft
    from minimind.files import atomic_write, refuse_to_replace

    model = options.model()
    path = options.adapter_path(options.lora_name, model.config)
    refuse_to_replace(path, "choose another --lora_name or move it")
    state = peft.import_peft(options.folder(model.config), model)
    atomic_write(path, lambda file: torch.save(state, file))
    print(f"{path}: use it with --lora_name {options.lora_name}")
    return 0
