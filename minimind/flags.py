"""Command-line flags from a dataclass: each field is a flag, its default the default, its `help` the help.

Imports nothing heavy, so that every `--help` answers at once.
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

WORD = -1  # what a word means that stands for a number
REQUIRED = object()  # the default of an argument without a name that must be given
YES, NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def boolean(text: str) -> bool:
    """`--use_moe 1`, `True`, `yes`: on. `0`, `False`, `no`: off. Anything else is refused."""
    if text.lower() in YES | NO:
        return text.lower() in YES
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no: write 1 or 0")


def named_path(text: str) -> Path:
    """Not the current folder for a variable of the shell that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; name a file or folder")
    return Path(text)


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Sequence[int] | None = None,
    positional: bool = False,
    word: str | None = None,
) -> Any:
    """A dataclass field that is a command-line flag, or an argument without a name.

    Args:
        default: `REQUIRED` for an argument that may not be left out.
        positional: without a name. A tuple takes several.
        word: stands for `WORD` where a number is wanted.
    """
    metadata = {"help": help, "choices": choices, "positional": positional, "word": word}
    return field(default=default, metadata=metadata)


def number_or(word: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        return WORD if text == word else int(text)

    parse.__name__ = f"number or {word}"  # argparse says "invalid … value"
    return parse


def parse_flags(options: type[Options], argv: Sequence[str] | None, description: str | None) -> Options:
    """Read `argv` (default: the process's arguments) into the dataclass `options`.

    A bare boolean flag means yes: `--use_wandb` and `--use_wandb 1` are the same. A wrong flag exits with
    code 2. The description is a docstring; it has an example of the command.
    """
    parser = Parser(description)
    add_flags(parser, options)
    return options(**vars(parser.parse_args(argv)))


class Parser(argparse.ArgumentParser):
    """Shows its description with the lines as they are, and of a mistake one line.

    The usage, which argparse shows before that, is some thirty lines for a training.
    """

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """None may be unknown: a subcommand says so itself, since it has the flag that was perhaps meant."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        unknown = [word for word in re.findall(r"(?<!\S)--?[a-z][\w-]*", message) if word not in known]
        near = get_close_matches(unknown[0], known, 1) if unknown else ()
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        self.exit(2, f"{self.prog}: error: {message}; {hint}\n")


def part_of(source: object, options: type[Options]) -> Options:
    """The dataclass `options` from what has its fields among others: parsed arguments, larger options."""
    return options(**{item.name: getattr(source, item.name) for item in fields(options)})


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, options: type) -> None:
    """Give `parser`, or a group of its flags, those of the dataclass `options`."""
    hints = typing.get_type_hints(options)
    for item in fields(options):
        name = item.name if item.metadata["positional"] else f"--{item.name}"
        parser.add_argument(name, **argument(item, hints[item.name]))


def argument(item: Field, hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for one field."""
    if isinstance(hint, types.UnionType):  # `int | None`: None is only a default
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    shown = "" if default in (None, "", REQUIRED) else f" (default: {default})"
    arguments = {"default": item.default, "help": (item.metadata["help"] + shown).replace("%", "%%")}
    if item.metadata["positional"]:
        several = typing.get_origin(hint) is tuple  # `minimind data download one.jsonl two.jsonl`
        hint = typing.get_args(hint)[0] if several else hint
        nargs = ("*" if several else "?") if default is not REQUIRED else "+" if several else None
        return arguments | {
            "type": named_path if hint is Path else hint,
            "nargs": nargs,
            "metavar": item.name.upper(),
        }
    if hint is bool:
        return arguments | {"type": boolean, "nargs": "?", "const": True, "metavar": "0|1"}
    if typing.get_origin(hint) is tuple:  # `--lora_name first second`, `--sizes_gb 0.1 1`
        hint = typing.get_args(hint)[0]
        arguments["nargs"] = "+"
    if item.metadata["choices"]:
        return arguments | {"choices": item.metadata["choices"]} | ({"type": int} if hint is int else {})
    if word := item.metadata["word"]:
        return arguments | {"type": number_or(word), "metavar": f"INT|{word}"}
    names = {Path: "PATH"} | ({str: "NAME"} if "nargs" in arguments else {})
    return arguments | {
        "type": named_path if hint is Path else hint,
        "metavar": names.get(hint, hint.__name__.upper()),
    }
