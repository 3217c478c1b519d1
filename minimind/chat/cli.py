"""`python eval_model.py`: talk to a trained model in the terminal, or answer `--prompt`s for a script.

torch is imported only once the arguments are known to be good, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from minimind.chat.options import WEIGHTS, SamplingOptions
from minimind.chat.questions import questions_for
from minimind.chat.session import ChatSession
from minimind.chat.talk import Talk
from minimind.config import PRESETS, ModelConfig
from minimind.errors import UserError
from minimind.flags import boolean, parser_settings
from minimind.paths import OUT_DIR
from minimind.stages import SCRIPTS
from minimind.stages.lora import check_names
from minimind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minimind.model import MiniMind

DESCRIPTION = """Talk to a model that MiniMind trained.

    python eval_model.py --model_mode 1                       a conversation with out/full_sft_512.pth
    python eval_model.py --model_mode 1 --prompt 你好          one answer on stdout, for a script
    python eval_model.py --lora_name lora_medical             with an adapter
"""
MODES = ("pretrain", "full_sft", "rlhf", "reason", "full_dist")  # stages, indexed by --model_mode


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the command line), load the model, answer. Returns the exit code.

    Raises: UserError for anything the user can mend.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    arguments = argument_parser().parse_args(argv)
    folder = arguments.hf_dir
    if arguments.load == 1 and folder is None:
        raise UserError("--load 1 reads a transformers directory; name it with --hf_dir")
    if folder and not folder.is_dir():
        raise UserError(f"--hf_dir {folder} is no directory; `minimind export hf FOLDER` writes one")
    options = SamplingOptions(**{f.name: getattr(arguments, f.name) for f in fields(SamplingOptions)})
    stage = MODES[arguments.model_mode]
    adapters = adapter_names(arguments)
    tokenizer = Tokenizer.load(arguments.tokenizer_path or folder)
    session = ChatSession(
        tokenizer,
        history_cnt=arguments.history_cnt,
        max_seq_len=arguments.max_seq_len,
        max_new_tokens=options.max_new_tokens,
        chat=stage != "pretrain",
    )
    notes = sys.stderr if arguments.prompt else sys.stdout
    path = folder.resolve() if folder else find_weights(stage, arguments, notes)
    model = load(path, adapters, arguments, tokenizer)
    check_positions(model.config, "max_seq_len", arguments.max_seq_len)
    name = " + ".join([path.name, *adapters])
    print(f"{name}, {model.num_parameters / 1e6:.2f} M parameters, {model.device}", file=notes)

    from minimind.chat.inference import InferenceModel

    inference_model = InferenceModel(model, arguments.weights)
    questions = questions_for(stage, adapters)
    talk = Talk(inference_model, session, options, notes, questions, reasons=stage == "reason")
    if arguments.prompt:
        for text in arguments.prompt:
            talk.answer(text)
    else:
        talk.interactively()
    return 0


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model_mode 0|1|2|3|4] [--prompt TEXT] …",  # the full list is below it anyway
        **parser_settings(DESCRIPTION),
    )
    add = parser.add_argument
    add("--prompt", action="append", help="answer this alone on stdout, and leave; may be repeated")

    which = parser.add_argument_group("which model")
    add = which.add_argument
    modes = ", ".join(f"{mode} {stage}" for mode, stage in enumerate(MODES))
    add("--model_mode", type=int, choices=range(len(MODES)), default=1, help=f"{modes} (%(default)s)")
    add("--out_dir", type=Path, default=OUT_DIR, help="folder of the weight files (%(default)s)")
    add("--preset", choices=PRESETS, help="shape, where out_dir has several")
    add("--hidden_size", type=int, help="shape, where out_dir has several")
    add("--num_hidden_layers", type=int, help="refuse a model with another number of layers")
    add("--use_moe", type=boolean, nargs="?", const=True, help="mixture of experts, where out_dir has both")
    add("--lora_name", nargs="+", default=[], metavar="NAME", help="LoRA adapters to add, one or several")
    add("--load", type=int, choices=(0, 1), default=0, help="0: a .pth file, 1: --hf_dir")
    add("--hf_dir", type=Path, help="transformers directory to load, as `minimind export hf` writes it")
    add("--tokenizer_path", type=Path, help="tokenizer directory, when it is not MiniMind's own")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--weights", choices=WEIGHTS, default="half", help="how they are held in memory (%(default)s)")

    how = parser.add_argument_group("how it answers")
    add = how.add_argument
    add("--history_cnt", type=int, default=0, help="earlier messages to keep in mind, an even number")
    add("--max_seq_len", type=int, default=8192, help="tokens of prompt and answer together (%(default)s)")
    add("--max_new_tokens", type=int, help="tokens of an answer (%(default)s)")
    add("--temperature", type=float, help="0: always the likeliest token (%(default)s)")
    add("--top_p", type=float, help="share of the probability to draw from (%(default)s)")
    add("--top_k", type=int, help="draw from the k likeliest tokens (all)")
    add("--min_p", type=float, help="draw none less likely than this share of the likeliest (%(default)s)")
    add("--repetition_penalty", type=float, help="1: none (%(default)s)")
    add("--seed", type=int, help="makes answers repeatable")
    parser.set_defaults(**asdict(SamplingOptions()))
    return parser


def adapter_names(arguments: argparse.Namespace) -> list[str]:
    """The adapters asked for; "None" is the seed's word for none."""
    names = [name for name in arguments.lora_name if name != "None"]
    if names and arguments.model_mode == 0:
        raise UserError("--lora_name: adapters belong to a model that answers; choose --model_mode 1 to 4")
    check_names(names)
    return names


def shape_of(config: ModelConfig) -> dict[str, int | bool]:
    """The sizes that flags can name."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "use_moe": config.num_experts > 0,
    }


def asked_shape(arguments: argparse.Namespace) -> dict[str, int | bool]:
    """The sizes that the command line insists on, by flag name; all others are read from the weights."""
    asked = shape_of(PRESETS[arguments.preset]) if arguments.preset else {}
    explicit = {name: getattr(arguments, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
    return asked | {name: value for name, value in explicit.items() if value is not None}


def command(script: str, shape: dict[str, int | bool], out_dir: Path) -> str:
    """How to make what is missing."""
    flags = "".join(f" --{name} {value}" for name, value in shape.items())
    return f"python {script}{flags}" + ("" if out_dir == OUT_DIR else f" --out_dir {out_dir}")


def find_weights(stage: str, arguments: argparse.Namespace, notes: TextIO) -> Path:
    """The stage's weight file in `out_dir` whose name agrees with the sizes asked for.

    Of several, the one of the default shape (512, dense) or else the smallest; `notes` says which.
    Raises: UserError when there is none, with the command that makes it.
    """
    out_dir, asked = arguments.out_dir, asked_shape(arguments)
    found = {}
    for path in out_dir.glob(f"{stage}_*.pth"):
        match = re.fullmatch(rf"{stage}_(\d+)(_moe)?\.pth", path.name)
        if match:
            shape = {"hidden_size": int(match[1]), "use_moe": match[2] is not None}
            if all(asked.get(name, value) == value for name, value in shape.items()):
                default = shape == {"hidden_size": 512, "use_moe": False}
                found[not default, *shape.values()] = path
    if not found:
        wanted = f"{stage} weights" + (" of the shape asked for" if asked else "")
        make = command(SCRIPTS[stage], asked, out_dir)
        raise UserError(f"{out_dir} has no {wanted}; make them with: {make}")
    first, *others = (found[key] for key in sorted(found))
    if others:
        names = ", ".join(path.name for path in others)
        print(f"taking {first.name}; --hidden_size and --use_moe choose another: {names}", file=notes)
    return first


def check_positions(config: ModelConfig, name: str, length: int) -> None:
    """Raises: UserError when the flag `name` asks for more tokens than the model has positions."""
    if length > config.max_position_embeddings:
        raise UserError(
            f"--{name} {length} is more than the {config.max_position_embeddings} positions of the model"
        )


def load(path: Path, adapters: list[str], arguments: argparse.Namespace, tokenizer: Tokenizer) -> MiniMind:
    """The model in `path`, a weight file or a transformers directory, with its adapters, ready to answer.

    Raises: UserError when there is no such device, a file is missing or damaged, or does not fit the
        model, the flags or the tokenizer.
    """
    from minimind.train.parallel import choose_device
    from minimind.weights import check_tokenizer, load_model

    device = choose_device(arguments.device)
    asked, out_dir = asked_shape(arguments), arguments.out_dir
    if path.is_dir():
        from minimind.export.folder import read_folder

        model = read_folder(path)
    else:
        model = load_model(path, command(SCRIPTS[MODES[arguments.model_mode]], asked, out_dir))
    config = model.config
    shape = shape_of(config)
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path} was trained with a vocabulary of {config.vocab_size}, but the tokenizer in "
            f"{tokenizer.path} has {tokenizer.vocab_size}; name the right one with --tokenizer_path"
        )
    if path.is_file():
        check_tokenizer(path, tokenizer)
    for name, wanted in asked.items():
        if shape[name] != wanted:
            raise UserError(
                f"{path} holds a model with {name} {shape[name]}, but {wanted} was asked for; "
                "without shape flags the shape is read from the file"
            )
    if adapters:
        from minimind.lora import load_adapters

        files = [out_dir / "lora" / f"{name}_{config.name}.pth" for name in adapters]
        load_adapters(model, files, command(SCRIPTS["lora"], shape, out_dir), tokenizer)
    return model.to(device).eval()
