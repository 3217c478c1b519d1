"""`minimind COMMAND …`: everything the project does as one command; the scripts in trainer/ call the same.

A command's module is imported when it is called, so that `minimind --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from minimind.errors import run_cli


class Command(NamedTuple):
    function: str  # module:name; takes the arguments, returns the exit code
    purpose: str


COMMANDS = {
    "demo": Command("minimind.demo.__main__:main", "train a small model on this machine and talk to it"),
    "train pretrain": Command("minimind.stages.pretrain:main", "train from zero to continue text"),
    "train sft": Command("minimind.stages.sft:main", "fine-tune to answer"),
    "train lora": Command("minimind.stages.lora:main", "fine-tune adapters beside the frozen model"),
    "train dpo": Command("minimind.stages.dpo:main", "learn from pairs of a better and a worse answer"),
    "train reason": Command("minimind.stages.reason:main", "learn to think before answering"),
    "train distill": Command("minimind.stages.distill:main", "learn from a larger model's probabilities"),
    "chat": Command("minimind.chat.cli:main", "talk to a model"),
    "serve": Command("minimind.server.cli:main", "a model behind OpenAI's API, and a page to talk to it"),
    "merge": Command("minimind.export.merge:main", "add adapters to a model's weights"),
    "export hf": Command("minimind.export.hf_cli:export", "write a model for transformers, TRL, vLLM …"),
    "import hf": Command("minimind.export.hf_cli:import_hf", "read a model from a Hugging Face folder"),
    "import pth": Command("minimind.export.hf_cli:import_pth", "read a weight file of MiniMind2"),
    "export gguf": Command("minimind.export.gguf_cli:export", "write a model for llama.cpp"),
    "export ollama": Command("minimind.export.gguf_cli:export_ollama", "write a model for ollama"),
    "export peft": Command("minimind.export.peft_cli:export", "write an adapter as a PEFT folder"),
    "import peft": Command("minimind.export.peft_cli:import_", "read an adapter from a PEFT folder"),
    "eval bpb": Command("minimind.evaluate.bpb_cli:main", "bits per byte of any data file"),
    "eval choice": Command("minimind.evaluate.choice_cli:main", "multiple choice: C-Eval, CMMLU"),
    "eval repetition": Command("minimind.evaluate.repetition_cli:main", "how many answers end in a loop"),
    "report": Command("minimind.evaluate.run_report:main", "one HTML page about a training run"),
    "data download": Command("minimind.data.download:main", "fetch the published data into dataset/"),
    "data check": Command("minimind.data.check:main", "find what is wrong in a data file"),
    "data stats": Command("minimind.data.stats:main", "lengths, languages, copies and rows of a data file"),
    "data convert": Command("minimind.data.convert:main", "to and from the formats of LLaMA-Factory"),
    "tokenizer": Command("minimind.tokenizer_training:main", "train a tokenizer of your own"),
    "estimate": Command("minimind.estimate:main", "what a stage will cost: time, money, memory"),
    "doctor": Command("minimind.doctor.cli:main", "check this machine"),
    "completion": Command("minimind.completion:main", "print what makes Tab complete all this in a shell"),
}


EXIT_CODES = """\
exit codes: 0 done, 1 a mistake that the message tells how to mend, 2 wrong usage, 75 a hanging process,
130 Ctrl-C, 143 SIGTERM"""


def usage(group: str = "") -> str:
    """The commands, or those of a group such as `train`."""
    listed = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    return (
        f"usage: minimind {group or 'COMMAND '}[--flag VALUE …]     with --help a command lists its flags\n\n"
        + "\n".join(f"  {name:<16} {command.purpose}" for name, command in listed.items())
    )


def is_group(word: str) -> bool:
    """Whether it begins commands of two words, as `train` does."""
    return any(name.startswith(f"{word} ") for name in COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) begins with. Returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in COMMANDS), None)
    if name:
        module, function = COMMANDS[name].function.split(":")
        sys.argv[0] = f"minimind {name}"  # what its --help and mistakes in flags call it
        return getattr(import_module(module), function)(words[len(name.split()) :])
    help_asked = not {"-h", "--help", "help"}.isdisjoint(words)
    asked = [word for word in words[:2] if word not in ("-h", "--help", "help")]
    group = asked[0] + " " if asked and is_group(asked[0]) else ""
    named = " ".join(asked) if len(asked) > bool(group) else ""
    if help_asked and not named:
        print(usage(group) if group else f"{usage()}\n\n{EXIT_CODES}")
        return 0
    wrong = f"there is no command {named!r}" if named else "name a command"
    print(f"error: {wrong}\n{usage(group)}", file=sys.stderr)
    return 2


def run() -> None:
    """The installed `minimind`."""
    run_cli(main)
