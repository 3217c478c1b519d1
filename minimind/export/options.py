"""Which weights a command is about: the flags that merging and the exports share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.chat.loading import MODES, ShapeOptions
from minimind.flags import flag
from minimind.stages.lora import check_names

if TYPE_CHECKING:
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer


@dataclass(frozen=True)
class WeightOptions(ShapeOptions):
    """A stage's weights, with adapters added to them."""

    from_weight: str = flag("full_sft", "stage whose weights to take", choices=MODES)
    lora_name: tuple[str, ...] = flag((), "adapters to add to them, one name or several")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")

    def __post_init__(self) -> None:
        check_names(self.lora_name)

    @property
    def stage(self) -> str:
        return self.from_weight

    @cached_property
    def weights(self) -> Path:
        return self.find_weights(sys.stderr)

    @property
    def title(self) -> str:
        """What the model is called in the programs it goes to."""
        return " + ".join([f"MiniMind {self.weights.stem}", *self.lora_name])

    def load(self) -> tuple[MiniMind, Tokenizer]:
        """The model, in fp32 on the CPU with the adapters merged in, and its tokenizer.

        Raises: UserError when a file is missing or damaged, or does not fit the flags or the tokenizer.
        """
        from minimind import lora
        from minimind.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.tokenizer_path)
        model = self.read_model(self.weights, tokenizer)
        if self.lora_name:
            self.add_adapters(model, self.lora_name, tokenizer)
            lora.merge(model)
        return model, tokenizer
