"""`python eval_model.py`: talk to a trained model in the terminal, or answer `--prompt`s for a script.

torch is imported only once the arguments are known to be good, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from minimind.chat.options import SamplingOptions
from minimind.chat.session import ChatSession
from minimind.config import PRESETS
from minimind.errors import UserError
from minimind.flags import boolean
from minimind.paths import OUT_DIR, ROOT
from minimind.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from minimind.model import MiniMind


class Stage(NamedTuple):
    name: str  # weight files are called {name}_{hidden}[_moe].pth
    script: str  # what makes them


STAGES = [  # indexed by --model_mode
    Stage("pretrain", "trainer/train_pretrain.py"),
    Stage("full_sft", "trainer/train_full_sft.py"),
    Stage("rlhf", "trainer/train_dpo.py"),
    Stage("reason", "trainer/train_distill_reason.py"),
]
NOT_YET = "this stage is not part of this version yet"

BEGINNINGS = [  # the automatic test of a pretrained model, which continues texts
    "长城是",
    "水在一个标准大气压下的沸点是",
    "春天来了，",
    "人工智能的主要应用包括",
    "学好数学的方法是",
    "The sun is",
]
QUESTIONS = [  # and of a chat model
    "你好，请介绍一下自己。",
    "中国的首都是哪里？",
    "天空为什么是蓝色的？",
    "12+35等于几？",
    "成语“画蛇添足”是什么意思？",
    "写一首关于秋天的短诗。",
    "What can you do?",
]
YOU, MODEL = "你 / you> ", "MiniMind> "


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the command line), load the model, answer. Returns the exit code.

    Raises: UserError for anything the user can mend.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    arguments = argument_parser().parse_args(argv)
    options = SamplingOptions(**{f.name: getattr(arguments, f.name) for f in fields(SamplingOptions)})
    refuse_what_is_not_built(arguments)
    tokenizer = Tokenizer.load(arguments.tokenizer_path)
    session = ChatSession(
        tokenizer,
        history_cnt=arguments.history_cnt,
        max_seq_len=arguments.max_seq_len,
        max_new_tokens=options.max_new_tokens,
        chat=arguments.model_mode != 0,
    )
    notes = sys.stderr if arguments.prompt else sys.stdout
    path = find_weights(arguments.out_dir, STAGES[arguments.model_mode], asked_shape(arguments), notes)
    model = load(path, arguments, tokenizer)
    print(f"{path.name}, {model.num_parameters / 1e6:.2f} M parameters, {model.device}", file=notes)

    talk = Talk(model, session, options, notes)
    if arguments.prompt:
        for text in arguments.prompt:
            talk.answer(text)
    else:
        talk.interactively()
    return 0


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model_mode 0|1|2|3] [--prompt TEXT] …",  # the full list is below it anyway
        description="Talk to a model that MiniMind trained.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", action="append", help="answer this alone on stdout, and leave; may be repeated")

    which = parser.add_argument_group("which model")
    add = which.add_argument
    modes = ", ".join(f"{mode} {stage.name}" for mode, stage in enumerate(STAGES))
    add("--model_mode", type=int, choices=range(len(STAGES)), default=1, help=f"{modes} (%(default)s)")
    add("--out_dir", type=Path, default=OUT_DIR, help="folder of the weight files (%(default)s)")
    add("--preset", choices=PRESETS, help="shape, where out_dir has several")
    add("--hidden_size", type=int, help="shape, where out_dir has several")
    add("--num_hidden_layers", type=int, help="refuse a model with another number of layers")
    add("--use_moe", type=boolean, nargs="?", const=True, help="mixture of experts, where out_dir has both")
    add("--lora_name", help="LoRA adapters to add")
    add("--load", type=int, choices=(0, 1), default=0, help="0: a .pth file, 1: a transformers directory")
    add("--tokenizer_path", type=Path, help="tokenizer directory, when it is not MiniMind's own")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")

    how = parser.add_argument_group("how it answers")
    add = how.add_argument
    add("--history_cnt", type=int, default=0, help="earlier messages to keep in mind, an even number")
    add("--max_seq_len", type=int, default=8192, help="tokens of prompt and answer together (%(default)s)")
    add("--max_new_tokens", type=int, help="tokens of an answer (%(default)s)")
    add("--temperature", type=float, help="0: always the likeliest token (%(default)s)")
    add("--top_p", type=float, help="share of the probability to draw from (%(default)s)")
    add("--top_k", type=int, help="draw from the k likeliest tokens (all)")
    add("--repetition_penalty", type=float, help="1: none (%(default)s)")
    add("--seed", type=int, help="makes answers repeatable")
    parser.set_defaults(**asdict(SamplingOptions()))
    return parser


def refuse_what_is_not_built(arguments: argparse.Namespace) -> None:
    if arguments.load == 1:
        raise UserError("--load 1 (a transformers directory) is not part of this version yet; use --load 0")
    if arguments.lora_name not in (None, "None"):
        raise UserError(
            f"--lora_name {arguments.lora_name}: adapters (lora/{{name}}_{{hidden}}.pth in --out_dir) "
            f"cannot be loaded, {NOT_YET}; leave the flag out"
        )


def asked_shape(arguments: argparse.Namespace) -> dict[str, int | bool]:
    """The sizes that the command line insists on, by flag name; all others are read from the weights."""
    asked = {}
    if arguments.preset:
        config = PRESETS[arguments.preset]
        asked = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "use_moe": config.num_experts > 0,
        }
    explicit = {name: getattr(arguments, name) for name in ("hidden_size", "num_hidden_layers", "use_moe")}
    return asked | {name: value for name, value in explicit.items() if value is not None}


def find_weights(out_dir: Path, stage: Stage, asked: dict[str, int | bool], notes: TextIO) -> Path:
    """The stage's weight file in `out_dir` whose name agrees with the sizes asked for.

    Of several, the one of the default shape (512, dense) or else the smallest; `notes` says which.
    Raises: UserError when there is none, with the command that makes it.
    """
    found = {}
    for path in out_dir.glob(f"{stage.name}_*.pth"):
        match = re.fullmatch(rf"{stage.name}_(\d+)(_moe)?\.pth", path.name)
        if match:
            shape = {"hidden_size": int(match[1]), "use_moe": match[2] is not None}
            if all(asked.get(name, value) == value for name, value in shape.items()):
                default = shape == {"hidden_size": 512, "use_moe": False}
                found[not default, *shape.values()] = path
    if not found:
        flags = "".join(f" --{name} {value}" for name, value in asked.items())
        wanted = f"{stage.name} weights" + (f" for{flags}" if flags else "")
        command = f"python {stage.script}"
        if not (ROOT / stage.script).exists():
            raise UserError(f"{out_dir} has no {wanted}; they come from `{command}`, and {NOT_YET}")
        elsewhere = "" if out_dir == OUT_DIR else f" --out_dir {out_dir}"
        raise UserError(f"{out_dir} has no {wanted}; make them with: {command}{flags}{elsewhere}")
    first, *others = (found[key] for key in sorted(found))
    if others:
        names = ", ".join(path.name for path in others)
        print(f"taking {first.name}; --hidden_size and --use_moe choose another: {names}", file=notes)
    return first


def load(path: Path, arguments: argparse.Namespace, tokenizer: Tokenizer) -> MiniMind:
    """The model in `path`, ready to answer on the device asked for.

    Raises: UserError when there is no such device, or the file is damaged or does not fit the
        flags or the tokenizer.
    """
    from minimind.train.parallel import choose_device
    from minimind.weights import check_tokenizer, load_model

    device = choose_device(arguments.device)
    model = load_model(path, f"python {STAGES[arguments.model_mode].script}")
    config = model.config
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path} was trained with a vocabulary of {config.vocab_size}, but the tokenizer in "
            f"{tokenizer.path} has {tokenizer.vocab_size}; name the right one with --tokenizer_path"
        )
    check_tokenizer(path, tokenizer)
    if arguments.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {arguments.max_seq_len} is more than the {config.max_position_embeddings} "
            "positions of the model"
        )
    for name, wanted in asked_shape(arguments).items():
        holds = config.num_experts > 0 if name == "use_moe" else getattr(config, name)
        if holds != wanted:
            raise UserError(
                f"{path} holds a model with {name} {holds}, but {wanted} was asked for; "
                "without shape flags the shape is read from the file"
            )
    return model.to(device).eval()


@dataclass
class Talk:
    """A model, what has been said, and where to write what is not part of an answer."""

    model: MiniMind
    session: ChatSession
    options: SamplingOptions
    notes: TextIO

    def answer(self, text: str) -> None:
        """Stream the answer to `text` to stdout, then note its speed. Ctrl-C passes on after that.

        Raises: UserError when `text` is too long.
        """
        from minimind.chat.generate import generate

        prompt_ids = self.session.prompt_ids(text)
        options = replace(self.options, max_new_tokens=self.session.answer_room(prompt_ids))
        decoder = StreamDecoder(self.session.tokenizer)  # not flushed: a character cut in half is not shown
        pieces: list[str] = []  # one a token
        start = time.perf_counter()
        try:
            for token in generate(self.model, prompt_ids, options):
                pieces.append(decoder.push(token))
                print(pieces[-1], end="", flush=True)
        finally:
            speed = len(pieces) / (time.perf_counter() - start)
            print(flush=True)
            print(f"[{len(pieces)} tokens, {speed:.1f} tokens/s]", file=self.notes)
            self.session.add(text, "".join(pieces))

    def interactively(self) -> None:
        """Answer the automatic questions or typed ones, until there are no more."""
        with contextlib.suppress(ImportError):  # line editing where the system has it
            import readline  # noqa: F401
        for text in self.questions():
            print(MODEL, end="", flush=True)
            try:
                self.answer(text)
            except KeyboardInterrupt:
                print("（已停止 / stopped）")
            except UserError as error:
                print(error)
        print("再见 / bye")

    def questions(self) -> Iterator[str]:
        """What to answer, one by one; anything but 0 and 1 at the first prompt is already a question."""
        choice = read_line("[0] 自动测试 / automatic test\n[1] 手动输入 / your own input\n> ")
        if choice == "0":
            for text in QUESTIONS if self.session.chat else BEGINNINGS:
                print(f"\n{YOU}{text}")
                yield text
            return
        if choice is None:
            return
        print("/clear 清空对话 forgets the conversation; Ctrl-C 停止回答 stops an answer; Ctrl-D 结束 ends")
        if choice not in ("", "1"):
            yield choice
        while (text := read_line(f"\n{YOU}")) is not None:
            if text == "/clear":
                self.session.clear()
                print("对话已清空 / forgotten")
            elif text:
                yield text


def read_line(prompt: str) -> str | None:
    """A line without the white space around it; None at the end of the input or on Ctrl-C."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: standard input is closed
        print()
        return None
