"""Which weights a command is about: the flags that merging and the exports share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import PRESETS, ModelConfig, model_config
from minimind.flags import flag
from minimind.paths import OUT_DIR

if TYPE_CHECKING:
    from minimind.model import MiniMind


@dataclass(frozen=True)
class ModelOptions:
    """Where weights are and which size they have, under the names that training uses."""

    out_dir: Path = flag(OUT_DIR, "folder of the weight files")
    preset: str | None = flag(None, "published model size", choices=tuple(PRESETS))
    hidden_size: int | None = flag(None, "width of the model; without preset and size: 512")
    num_hidden_layers: int | None = flag(None, "number of layers")
    use_moe: bool | None = flag(None, "a mixture of experts")

    def config(self, vocab_size: int = ModelConfig.vocab_size) -> ModelConfig:
        return model_config(
            self.preset, self.hidden_size, self.num_hidden_layers, self.use_moe, vocab_size=vocab_size
        )

    def model(self) -> MiniMind:
        """A model of this shape without weights, to hold adapters against."""
        import torch

        from minimind.model import MiniMind

        with torch.device("meta"):
            return MiniMind(self.config())

    def adapter_path(self, name: str) -> Path:
        return self.out_dir / "lora" / f"{name}_{self.config().name}.pth"

    def command(self, script: str) -> str:
        """How to train a model of this shape, for messages."""
        flags = ("preset", "hidden_size", "num_hidden_layers", "use_moe")
        given = [f" --{name} {getattr(self, name)}" for name in flags if getattr(self, name) is not None]
        elsewhere = "" if self.out_dir == OUT_DIR else f" --out_dir {self.out_dir}"
        return f"python {script}{''.join(given)}{elsewhere}"
