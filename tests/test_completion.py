"""What Tab offers, asked of the shells themselves."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

import pytest

from minimind.cli import COMMANDS
from minimind.completion import SHELLS, parser_of, whole_parser

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_minimind
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "function minimind; end; source $argv[1]; complete -C (string join ' ' -- $argv[2..])"
TYPED = [
    ([""], {"train", "chat", "export", "completion"}, {"pretrain"}),
    (["tra"], {"train"}, {"chat"}),
    (["train", ""], {"pretrain", "sft", "lora", "dpo", "reason", "distill"}, {"peft"}),
    (["export", ""], {"peft"}, {"sft"}),
    (["train", "sft", "--ep"], {"--epochs"}, {"--eval_path", "--lora_rank"}),
    (["train", "sft", "--optimizer", ""], {"auto", "muon", "adamw"}, {"tiny"}),
    (["train", "sft", "--optimizer", "m"], {"muon"}, {"adamw"}),
    (["train", "sft", "--use_moe", "--ep"], {"--epochs"}, set()),
    (["train", "sft", "--data_path", "ch"], {"chats.jsonl"}, {"other"}),
    (["train", "sft", "--out_dir", "fo"], {"folder"}, {"former.txt"}),
    (["estimate", "pretrain", "--gpu", "30"], {"3060", "3080", "3090"}, {"4090"}),
    (["chat", "--model_mode", ""], {"0", "1", "2", "3", "4"}, set()),
    (["data", "check", "ch"], {"chats.jsonl"}, {"other"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The completion script of each shell, as the command prints it."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        printed = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "minimind", "completion", shell],
            capture_output=True,
            text=True,
            check=True,
        )
        assert " torch" not in printed.stderr
        (folder / shell).write_text(printed.stdout)
    return folder


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    TYPED,
    ids=lambda v: "-".join(v if isinstance(v, list) else sorted(v)),
)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_tab_offers(scripts, tmp_path, shell, words, offered, not_offered):
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    for name in ("chats.jsonl", "other", "former.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    command = [shell, "-c", BASH if shell == "bash" else FISH]
    command += ["bash"] if shell == "bash" else []  # its $0
    done = subprocess.run(
        [*command, str(scripts / shell), "minimind", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    shown = {line.split("\t")[0].rstrip("/ ") for line in done.stdout.splitlines()}
    assert offered <= shown
    assert not not_offered & shown


def test_zsh_can_read_its_script(scripts):
    if not shutil.which("zsh"):
        pytest.skip("there is no zsh")
    subprocess.run(["zsh", "-n", scripts / "zsh"], check=True)


def test_every_flag_of_every_command_is_in_the_scripts(scripts):
    whole = whole_parser()
    for name in COMMANDS:
        parser = whole
        for word in name.split():
            parser = subparsers(parser)[word]
        for action in parser._actions:
            for flag in action.option_strings:
                assert all(flag.lstrip("-") in (scripts / shell).read_text() for shell in SHELLS)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0].choices if found else {}


def test_a_shell_of_another_name_is_refused(capsys):
    from minimind.completion import main

    with pytest.raises(SystemExit) as ended:
        main(["powershell"])
    assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_parsers_are_taken_without_running_anything(capsys):
    def main(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--size")
        parser.parse_args(argv)
        raise AssertionError("it went on")

    assert parser_of(main).parse_args(["--size", "3"]).size == "3"  # parsing works again, too
    with pytest.raises(TypeError, match="ends before it parses"):
        parser_of(lambda argv: 0)
    assert capsys.readouterr().out == ""
