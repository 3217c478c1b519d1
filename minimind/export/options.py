"""Which weights a command is about: the flags that merging and the exports share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import PRESETS, ModelConfig, model_config
from minimind.flags import flag
from minimind.paths import OUT_DIR
from minimind.stages import SCRIPTS, command
from minimind.stages.lora import check_names

if TYPE_CHECKING:
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer


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
        shape = ("preset", "hidden_size", "num_hidden_layers", "use_moe")
        given = {name: getattr(self, name) for name in shape if getattr(self, name) is not None}
        return command(script, given, self.out_dir)


@dataclass(frozen=True)
class WeightOptions(ModelOptions):
    """A stage's weights, with adapters added to them."""

    from_weight: str = flag("full_sft", "stage whose weights to take")
    lora_name: tuple[str, ...] = flag((), "adapters to add to them, one name or several")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")

    def __post_init__(self) -> None:
        check_names(self.lora_name)

    @property
    def weights(self) -> Path:
        return self.out_dir / f"{self.from_weight}_{self.config().name}.pth"

    @property
    def title(self) -> str:
        """What the model is called in the programs it goes to."""
        return " + ".join([f"MiniMind {self.weights.stem}", *self.lora_name])

    @property
    def adapters(self) -> list[Path]:
        return [self.adapter_path(name) for name in self.lora_name]

    def load(self) -> tuple[MiniMind, Tokenizer]:
        """The model, in fp32 on the CPU with the adapters merged in, and its tokenizer.

        Raises: UserError when a file is missing or damaged, or does not fit the flags or the tokenizer.
        """
        from minimind import lora
        from minimind.tokenizer import Tokenizer
        from minimind.weights import check_tokenizer, load_model

        tokenizer = Tokenizer.load(self.tokenizer_path)
        script = SCRIPTS.get(self.from_weight)
        how_to_make = self.command(script) if script else f"a stage that writes {self.weights.name}"
        model = load_model(self.weights, how_to_make, self.config(tokenizer.vocab_size))
        check_tokenizer(self.weights, tokenizer)
        if self.adapters:
            lora.load_adapters(model, self.adapters, self.command(SCRIPTS["lora"]), tokenizer)
            lora.merge(model)
        return model, tokenizer
