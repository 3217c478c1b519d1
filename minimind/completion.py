"""What makes Tab complete commands, flags, their choices and files in a shell: a script for it, printed.

    minimind completion bash > ~/.local/share/bash-completion/completions/minimind
    minimind completion zsh > ~/.zfunc/_minimind            with fpath+=~/.zfunc before compinit in ~/.zshrc
    minimind completion fish > ~/.config/fish/completions/minimind.fish

The script knows all commands, so no Python runs when Tab is pressed. Print it again after an update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from minimind.cli import COMMANDS
from minimind.flags import Parser, named_path

SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")
    shell = parser.parse_args(argv).shell
    import shtab

    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands: groups such as `train`, in them the parsers that the commands have."""
    import shtab

    whole = argparse.ArgumentParser(prog="minimind")
    top = whole.add_subparsers()
    groups: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        group, _, rest = name.rpartition(" ")
        if group and group not in groups:
            purpose = ", ".join(each.split()[1] for each in COMMANDS if each.startswith(f"{group} "))
            groups[group] = top.add_parser(group, help=purpose).add_subparsers()
        module, function = command.function.split(":")
        parser = parser_of(getattr(import_module(module), function))
        for action in parser._actions:
            if action.type is named_path:
                is_folder = action.dest.endswith(("_dir", "tokenizer_path"))
                action.complete = shtab.DIRECTORY if is_folder else shtab.FILE  # type: ignore[attr-defined]
        groups.get(group, top).add_parser(rest, help=command.purpose, parents=[parser], add_help=False)
    return whole


class Parsing(BaseException):
    """Leaves a command at the moment when it would parse its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(main: Callable[[Sequence[str]], int | None]) -> argparse.ArgumentParser:
    """The parser of a command. A command begins by parsing its arguments: it is called, and stopped there.

    So a command says what its flags are in one place, and nothing of what it imports later is imported.
    """

    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise Parsing(parser)

    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop  # type: ignore[method-assign, assignment]
    try:
        main([])
    except Parsing as reached:
        return reached.parser
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    raise TypeError(f"{main.__module__} ends before it parses its arguments")
