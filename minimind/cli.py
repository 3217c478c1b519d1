"""`minimind COMMAND …`: what the scripts in trainer/ do, and what to do with adapters, as one command.

A command's module is imported when it is called, so that `minimind --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minimind.config import PRESETS, ModelConfig, model_config
from minimind.errors import UserError, run_cli
from minimind.flags import flag, parse_flags
from minimind.paths import OUT_DIR
from minimind.stages import SCRIPTS
from minimind.stages.lora import check_name, check_names

if TYPE_CHECKING:
    from minimind.model import MiniMind


class Command(NamedTuple):
    function: str  # module:name; takes the arguments, returns the exit code
    purpose: str


COMMANDS = {
    "pretrain": Command("minimind.stages.pretrain:main", "train from zero to continue text"),
    "sft": Command("minimind.stages.sft:main", "fine-tune to answer"),
    "lora": Command("minimind.stages.lora:main", "fine-tune adapters beside the frozen model"),
    "dpo": Command("minimind.stages.dpo:main", "learn from pairs of a better and a worse answer"),
    "reason": Command("minimind.stages.reason:main", "learn to think before answering"),
    "distill": Command("minimind.stages.distill:main", "learn from the probabilities of a larger model"),
    "estimate": Command("minimind.estimate:main", "what a stage will cost: time, money, memory"),
    "doctor": Command("minimind.doctor.cli:main", "check a data file, or this machine"),
    "chat": Command("minimind.chat.cli:main", "talk to a model"),
    "merge": Command("minimind.cli:merge", "add adapters to a model's weights"),
    "export-peft": Command("minimind.cli:export_peft", "write an adapter as a PEFT folder"),
    "import-peft": Command("minimind.cli:import_peft", "read an adapter from a PEFT folder"),
}
USAGE = (
    "usage: minimind COMMAND [--flag VALUE …]     `minimind COMMAND --help` lists the flags\n\n"
    + "\n".join(f"  {name:<12} {command.purpose}" for name, command in COMMANDS.items())
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) begins with. Returns its exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        wrong = f"there is no command {name!r}" if name else "name a command"
        print(f"error: {wrong}\n{USAGE}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name].function.split(":")
    sys.argv[0] = f"minimind {name}"  # what its --help and mistakes in flags call it
    return getattr(import_module(module), function)(arguments)


def run() -> None:
    """The installed `minimind`."""
    run_cli(main)


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


@dataclass(frozen=True)
class MergeOptions(ModelOptions):
    lora_name: tuple[str, ...] = flag(("lora_medical",), "adapters to add, one name or several")
    from_weight: str = flag("full_sft", "stage whose weights they are added to")
    output_dir: Path | None = flag(None, "folder of the result; without it merged/ in out_dir")
    tokenizer_path: Path | None = flag(None, "folder of another tokenizer.json; without it the shipped one")


def merge(argv: Sequence[str] | None = None) -> int:
    """Add adapters to a model's weights.

    The result is a weight file like any other, in a folder of its own under the name of the weights it came
    from: every command takes that folder as its --out_dir.
    """
    options = parse_flags(MergeOptions, argv, merge.__doc__)
    check_names(options.lora_name)
    import torch

    from minimind import lora
    from minimind.files import atomic_write
    from minimind.tokenizer import Tokenizer
    from minimind.weights import check_tokenizer, load_model

    tokenizer = Tokenizer.load(options.tokenizer_path)
    config = options.config(tokenizer.vocab_size)
    base = options.out_dir / f"{options.from_weight}_{config.name}.pth"
    target = (options.output_dir or options.out_dir / "merged") / base.name
    if target.exists():
        raise UserError(f"{target} exists already; choose another --output_dir or move it")
    script = SCRIPTS.get(options.from_weight)
    model = load_model(
        base, options.command(script) if script else f"a stage that writes {base.name}", config
    )
    check_tokenizer(base, tokenizer)
    adapters = [options.adapter_path(name) for name in options.lora_name]
    lora.load_adapters(model, adapters, options.command(SCRIPTS["lora"]), tokenizer)
    lora.merge(model)

    # Kept in fp32: sums rounded to fp16 would move logits by more than 1e-5.
    atomic_write(target, lambda file: torch.save(model.state_dict(), file))
    run = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "merged": [str(path) for path in (base, *adapters)],
    }
    atomic_write(
        target.parent / "runs" / target.stem / "run.json",
        lambda file: file.write(json.dumps(run, indent=2, ensure_ascii=False).encode()),
    )
    names = ", ".join(options.lora_name)
    print(f"{target}: {base.name} with {names}; other commands find it with --out_dir {target.parent}")
    return 0


@dataclass(frozen=True)
class PeftOptions(ModelOptions):
    lora_name: str = flag("lora_medical", "name of the adapter")
    peft_dir: Path | None = flag(None, "PEFT's folder; without it peft/ in out_dir")

    def __post_init__(self) -> None:
        check_name(self.lora_name)

    @property
    def folder(self) -> Path:
        return self.peft_dir or self.out_dir / "peft" / f"{self.lora_name}_{self.config().name}"


@dataclass(frozen=True)
class ExportOptions(PeftOptions):
    base_model: str | None = flag(
        None, "name or folder of the model in transformers' format, to be noted there"
    )


def export_peft(argv: Sequence[str] | None = None) -> int:
    """Write an adapter as a PEFT folder."""
    options = parse_flags(ExportOptions, argv, export_peft.__doc__)
    from minimind.export import peft
    from minimind.lora import read_adapters

    path = options.adapter_path(options.lora_name)
    if (options.folder / peft.CONFIG).exists():
        raise UserError(f"{options.folder} holds an adapter already; choose another --peft_dir or move it")
    state = read_adapters(path, options.model(), options.command(SCRIPTS["lora"]))
    peft.export_peft(state, options.folder, options.base_model)
    print(f"{options.folder}: {path.name} for PEFT")
    return 0


def import_peft(argv: Sequence[str] | None = None) -> int:
    """Read an adapter from a PEFT folder."""
    options = parse_flags(PeftOptions, argv, import_peft.__doc__)
    import torch

    from minimind.export import peft
    from minimind.files import atomic_write

    path = options.adapter_path(options.lora_name)
    if path.exists():
        raise UserError(f"{path} exists already; choose another --lora_name or move it")
    state = peft.import_peft(options.folder, options.model())
    atomic_write(path, lambda file: torch.save(state, file))
    print(f"{path}: use it with --lora_name {options.lora_name}")
    return 0
