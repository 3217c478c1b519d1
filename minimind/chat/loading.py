"""Which trained model to talk to, to serve or to evaluate: found among the weight files, and loaded.

Free of torch until a model is loaded, so that `--help` and mistakes in flags answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from minimind.chat.options import WEIGHTS
from minimind.config import PRESETS, ModelConfig
from minimind.errors import UserError
from minimind.flags import flag
from minimind.paths import OUT_DIR
from minimind.stages import SCRIPTS, command
from minimind.stages.lora import check_names

if TYPE_CHECKING:
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer

MODES = ("pretrain", "full_sft", "rlhf", "reason", "full_dist")  # stages, indexed by --model_mode


@dataclass(frozen=True)
class ShapeOptions:
    """Which shape of a model, where a folder has several; without these flags the files tell."""

    out_dir: Path = flag(OUT_DIR, "folder of the weight files")
    preset: str | None = flag(None, "shape, where out_dir has several", choices=tuple(PRESETS))
    hidden_size: int | None = flag(None, "shape, where out_dir has several")
    num_hidden_layers: int | None = flag(None, "refuse a model with another number of layers")
    use_moe: bool | None = flag(None, "mixture of experts, where out_dir has both")

    @property
    def stage(self) -> str:
        """The stage whose weights are meant, which is the first part of their name."""
        return "full_sft"

    @property
    def asked_shape(self) -> dict[str, int | bool]:
        """The sizes that the flags insist on, by flag name; all others are read from the weights."""
        asked = shape_of(PRESETS[self.preset]) if self.preset else {}
        explicit = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
        return asked | {name: value for name, value in explicit.items() if value is not None}

    def find_weights(self, notes: TextIO) -> Path:
        """The stage's weight file in `out_dir` whose name agrees with the sizes asked for.

        Of several, the one of the default shape (512, dense) or else the smallest; `notes` says which.
        Raises: UserError when there is none, with the command that makes it.
        """
        asked, found = self.asked_shape, {}
        for path in self.out_dir.glob(f"{self.stage}_*.pth"):
            match = re.fullmatch(rf"{self.stage}_(\d+)(_moe)?\.pth", path.name)
            if match:
                shape = {"hidden_size": int(match[1]), "use_moe": match[2] is not None}
                if all(asked.get(name, value) == value for name, value in shape.items()):
                    default = shape == {"hidden_size": 512, "use_moe": False}
                    found[not default, *shape.values()] = path
        if not found:
            wanted = f"{self.stage} weights" + (" of the shape asked for" if asked else "")
            there = ", ".join(sorted(path.name for path in self.out_dir.glob(f"{self.stage}_*.pth")))
            but = f", but {there}" if there else ""
            raise UserError(f"{self.out_dir} has no {wanted}{but}; make them with: {self.how_to_make}")
        first, *others = (found[key] for key in sorted(found))
        if others:
            names = ", ".join(path.name for path in others)
            print(f"taking {first.name}; --hidden_size and --use_moe choose another: {names}", file=notes)
        return first

    @property
    def how_to_make(self) -> str:
        """The command that trains a model of the shape asked for, for messages."""
        return command(SCRIPTS[self.stage], self.asked_shape, self.out_dir)

    def read_model(self, path: Path, tokenizer: Tokenizer) -> MiniMind:
        """The model in `path`, a weight file or a transformers directory, in fp32 on the CPU.

        Raises: UserError when a file is missing or damaged, or does not fit the flags or the tokenizer.
        """
        from minimind.weights import check_tokenizer, check_vocabulary, load_model

        if path.is_dir():
            from minimind.export.folder import read_folder

            model = read_folder(path)
        else:
            model = load_model(path, self.how_to_make)
        check_vocabulary(path, model.config, tokenizer)
        if path.is_file():
            check_tokenizer(path, tokenizer)
        shape = shape_of(model.config)
        for name, wanted in self.asked_shape.items():
            if shape[name] != wanted:
                raise UserError(
                    f"{path} holds a model with {name} {shape[name]}, but {wanted} was asked for; "
                    "without shape flags the shape is read from the file"
                )
        return model

    def add_adapters(self, model: MiniMind, names: Sequence[str], tokenizer: Tokenizer) -> None:
        """Put the adapters of `names` beside the projections of `model`.

        Raises: UserError when a file is missing or damaged, or does not fit the model or the tokenizer.
        """
        from minimind.lora import load_adapters

        files = [self.adapter_path(name, model.config) for name in names]
        load_adapters(model, files, self.how_to_adapt(model.config), tokenizer)

    def how_to_adapt(self, config: ModelConfig) -> str:
        """The command that trains an adapter of a model of this shape, for messages."""
        return command(SCRIPTS["lora"], shape_of(config), self.out_dir)

    def adapter_path(self, name: str, config: ModelConfig) -> Path:
        return self.out_dir / "lora" / f"{name}_{config.name}.pth"


@dataclass(frozen=True)
class LoadOptions(ShapeOptions):
    """The flags of every command that uses a trained model: it may be one in a transformers directory too."""

    model_mode: int = flag(
        1, ", ".join(f"{mode} {stage}" for mode, stage in enumerate(MODES)), choices=range(len(MODES))
    )
    lora_name: tuple[str, ...] = flag((), "LoRA adapters to add, one or several")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    hf_dir: Path | None = flag(None, "transformers directory to load, as `minimind export hf` writes it")

    def __post_init__(self) -> None:
        if self.adapters and self.stage == "pretrain":
            raise UserError(
                "--lora_name: adapters belong to a model that answers; choose --model_mode 1 to 4"
            )
        check_names(self.adapters)

    @property
    def stage(self) -> str:
        return MODES[self.model_mode]

    @property
    def adapters(self) -> list[str]:
        """The names of those asked for; "None" is the seed's word for none."""
        return [name for name in self.lora_name if name != "None"]

    def find_weights(self, notes: TextIO) -> Path:
        if self.hf_dir is None:
            return super().find_weights(notes)
        if not self.hf_dir.is_dir():
            raise UserError(f"--hf_dir {self.hf_dir} is no directory; `minimind export hf FOLDER` writes one")
        return self.hf_dir.resolve()

    def load_tokenizer(self) -> Tokenizer:
        """The one named, or the one in the transformers directory, or the shipped one."""
        from minimind.tokenizer import Tokenizer

        return Tokenizer.load(self.tokenizer_path or self.hf_dir)

    def load_model(self, path: Path, adapters: Sequence[str], tokenizer: Tokenizer) -> MiniMind:
        """The model in `path`, a weight file or a transformers directory, with `adapters`, ready to answer.

        Raises: UserError when there is no such device, or as `read_model` and `add_adapters` do.
        """
        from minimind.train.parallel import choose_device

        device = choose_device(self.device)
        model = self.read_model(path, tokenizer)
        if adapters:
            self.add_adapters(model, adapters, tokenizer)
        return model.to(device).eval()


@dataclass(frozen=True)
class AnswerOptions(LoadOptions):
    """The flags of the commands that answer with a model."""

    load: int = flag(0, "1 insists on --hf_dir, which alone says as much", choices=(0, 1))
    weights: str = flag("half", "how they are held in memory", choices=WEIGHTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load == 1 and self.hf_dir is None:
            raise UserError("--load 1 reads a transformers directory; name it with --hf_dir")


def shape_of(config: ModelConfig) -> dict[str, int | bool]:
    """The sizes that flags can name."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "use_moe": config.num_experts > 0,
    }


def check_positions(config: ModelConfig, name: str, length: int) -> None:
    """Raises: UserError when the flag `name` asks for more tokens than the model has positions."""
    if length > config.max_position_embeddings:
        raise UserError(
            f"--{name} {length} is more than the {config.max_position_embeddings} positions of the model"
        )


def description(name: str, model: MiniMind) -> str:
    """What a command says of the model that it has loaded."""
    return f"{name}, {model.num_parameters / 1e6:.2f} M parameters, {model.device}"
