"""The commands that the documentation shows, and whether the project has them with these flags.

A command counts as marked when a comment on its line, or on the line above, says what it needs (`# needs a
GPU`, `# 需要网络`). It is then not run by a test, but its flags are checked all the same.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from minimind import cli
from minimind.paths import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", "dataset/*.md", "docs/**/*.md", "minimind/assets/**/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:minimind|python|make|torchrun|deepspeed) [^`\n]+)`(?!`)")
NEEDS = re.compile(r"#.*(?:\bneeds\b|需要)")
OWN_WORDS = {"cd", "export", "source", "mkdir", "pre-commit"}  # of a shell, and of the tools in `dev`
LAUNCHERS = ("torchrun", "deepspeed")


class Command(NamedTuple):
    page: str
    words: tuple[str, ...]
    folder: Path  # it is typed in
    marked: bool
    whole: bool = True  # False in the middle of a sentence or with a "…", where arguments may be left out

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


class Wrong(Exception):
    """A command that cannot be typed as it stands in the documentation."""


# ---- Reading pages ----


def documented_commands() -> Iterator[Command]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT).as_posix()
        for language, block in BLOCK.findall(text):
            if language in ("bash", "sh", "shell", "console"):
                yield from block_commands(name, block, is_console=language == "console")
        for line in INLINE.findall(BLOCK.sub("", text)):
            yield from (command._replace(whole=False) for command in block_commands(name, line))


def block_commands(page: str, block: str, is_console: bool = False) -> Iterator[Command]:
    folder, marked_above = ROOT, False
    for line in whole_lines(block, is_console):
        if line.startswith("#"):
            marked_above = bool(NEEDS.search(line))
            continue
        marked = marked_above or bool(NEEDS.search(line))
        marked_above = False
        for words in simple_commands(line):
            if words[0] == "cd":
                folder = (folder / words[1]).resolve()
            whole = not any("…" in word or "..." in word for word in words)
            words = tuple(word for word in words if word not in ("…", "..."))
            yield Command(page, words, folder, marked, whole)


def whole_lines(block: str, is_console: bool) -> Iterator[str]:
    """Lines as a shell takes them: those that end in a backslash, or inside quotes, go on in the next."""
    pending = ""
    for line in block.splitlines():
        if is_console and not pending:
            if not line.startswith("$ "):
                continue  # what a command has printed
            line = line[2:]
        pending = f"{pending}{line}"
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        if pending.strip():
            yield pending.strip()
        pending = ""
    if pending:
        raise Wrong(f"a quotation is not closed: {pending[:80]}")


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line, without redirections and settings of the environment."""
    tokens = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    tokens.whitespace_split = True
    words: list[str] = []
    redirected = False
    for token in [*tokens, ";"]:
        if set(token) <= set("|&;"):
            if words:
                yield tuple(words)
            words = []
        elif set(token) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif words or not re.fullmatch(r"\w+=.*", token, re.DOTALL):
            words.append(token)


# ---- What they stand for ----


def kind(command: Command) -> str:
    """What runs: a command of `minimind`, a module, a launcher, `make TARGET`, or another program."""
    program, *arguments = command.words
    program = program.removeprefix(".venv/bin/")
    if program in LAUNCHERS:
        return program
    if program == "make":
        return f"make {arguments[0] if arguments else ''}".strip()
    main, _ = own_main(command) or (None, [])
    if main is None:
        return program
    for name, (function, _) in cli.COMMANDS.items():
        if function == f"{main.__module__}:{main.__name__}":
            return name
    return main.__module__.removesuffix(".__main__")


def own_main(command: Command) -> tuple[Callable[..., Any], list[str]] | None:
    """The function behind a command of the project, and its arguments; None for other programs.

    Raises: Wrong when there is no such script, module or command.
    """
    program, *arguments = command.words
    program = program.removeprefix(".venv/bin/")
    if program == "minimind":
        return own_command(arguments)
    if program not in ("python", "python3") or not arguments:
        return None
    if arguments[0] == "-m":
        module, *arguments = arguments[1:]
        if module == "minimind":
            return own_command(arguments)
        if module.split(".")[0] not in ("benchmarks", "faults", "minimind"):
            return None
        return module_main(module), arguments
    script = command.folder / arguments[0]
    if not script.is_file():
        raise Wrong(f"there is no {script}")
    with patch.object(sys, "path", [*sys.path]):
        main = runpy.run_path(str(script)).get("MAIN")
    if main is None:
        return no_flags, arguments[1:]
    module, function = main.split(":")
    return getattr(importlib.import_module(module), function), arguments[1:]


def own_command(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    name = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in cli.COMMANDS), None)
    if name is None:
        return cli.main, words
    module, function = cli.COMMANDS[name].function.split(":")
    return getattr(importlib.import_module(module), function), words[len(name.split()) :]


def module_main(name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise Wrong(f"python -m {name}: {error}") from None
    return module.main


def no_flags(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser().parse_args(arguments)


# ---- Whether they are right ----


class Parsed(BaseException):
    """The arguments were accepted: as far as a check goes."""


def check(command: Command) -> None:
    """Raises: Wrong unless the command exists and takes these flags."""
    program, *arguments = command.words
    program = program.removeprefix(".venv/bin/")
    if program in LAUNCHERS:
        if command.whole or any(word.endswith(".py") for word in arguments):
            launched = launched_command(program, arguments, command)
            if launched:
                check(launched)
    elif program == "make":
        check_target(arguments)
    elif program == "pip":  # says by itself that it needs the network
        check_extras(arguments)
    elif found := own_main(command):
        check_flags(*found, command.whole)
    elif not command.marked and program not in OWN_WORDS and not is_helper_of_tests(command.words):
        raise Wrong(f"no command of this project; say what it needs in a comment: {NEEDS.pattern}")


def is_helper_of_tests(words: Sequence[str]) -> bool:
    """`python -m tests.…`, which takes no flags"""
    _, *arguments = words
    return (
        len(arguments) == 2
        and arguments[0] == "-m"
        and arguments[1].startswith("tests.")
        and bool(find_spec(arguments[1]))
    )


def launched_command(launcher: str, arguments: list[str], command: Command) -> Command | None:
    """What a launcher starts, as a command of its own; None where the launcher is not installed."""
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        try:
            parsed = get_args_parser().parse_args(arguments)
        except SystemExit:
            raise Wrong(f"torchrun does not take {' '.join(arguments)}") from None
        script, flags, is_module = parsed.training_script, parsed.training_script_args, parsed.module
    else:
        try:
            from deepspeed.launcher.runner import parse_args
        except ImportError:
            return None
        parsed = parse_args(arguments)
        script, flags, is_module = parsed.user_script, parsed.user_args, parsed.module
    return command._replace(words=("python", *(["-m"] if is_module else []), script, *flags))


def check_target(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = [word for word in arguments if "=" not in word and word not in targets]
    if missing:
        raise Wrong(f"the Makefile has no {', '.join(missing)}")


def check_extras(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if re.match(r"minimind\b", word):
            raise Wrong("the package index has another project of that name; say -e '.[…]'")
        if found := re.fullmatch(r"\.\[(.+)\]", word):
            for extra in found[1].split(","):
                if extra.strip() not in extras:
                    raise Wrong(f"pyproject.toml has no extra {extra}")


def check_flags(main: Callable[..., Any], arguments: list[str], whole: bool) -> None:
    """Call `main`, and stop it once it has taken its arguments.

    `parse_flags` also makes the options, whose values it then has checked; who has no dataclass of options
    has a parser at least.
    """
    if main is cli.main and not whole and (not arguments or cli.is_group(arguments[0])):
        return
    parse_args = argparse.ArgumentParser.parse_args
    space = main.__globals__

    def parse(parser: argparse.ArgumentParser, argv: Any = None, *_: Any) -> None:
        parse_args(parser, argv)
        raise Parsed

    def parse_options(*arguments: Any) -> None:
        space_parse_flags(*arguments)
        raise Parsed

    space_parse_flags = space.get("parse_flags")
    said = io.StringIO()
    try:
        with redirect_stderr(said), patch.object(sys, "stdout", io.StringIO()):
            if space_parse_flags:
                with patch.dict(space, parse_flags=parse_options):
                    code = main(arguments)
            else:
                with patch.object(argparse.ArgumentParser, "parse_args", parse):
                    code = main(arguments)
    except Parsed:
        return
    except SystemExit as ended:
        code = ended.code
    error = next((line for line in said.getvalue().splitlines() if "error: " in line), "")
    if code and (whole or not re.search(r"arguments are required|expected .*argument", error)):
        raise Wrong(error)
