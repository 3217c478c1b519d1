"""The `minimind` command from the outside: what it dispatches to, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind.cli import COMMANDS, main
from minimind.errors import run_cli
from minimind.paths import ROOT


def test_a_package_that_is_missing_is_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "needs_more.py").write_text("import no_such_package.part\n")
    (tmp_path / "has_a_bug.py").write_text("import minimind.no_such_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_cli("needs_more:main")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"error: the package no_such_package is not installed for {sys.executable}; first: source" in said
    with pytest.raises(ModuleNotFoundError):
        run_cli("has_a_bug:main")


def test_a_full_disk_under_the_output_is_a_sentence():
    for arguments in (["--help"], ["completion", "bash"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "minimind", *arguments]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "error: No space left on device: standard output\n")


def test_a_path_from_an_unset_variable_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--out_dir", ""])
    assert ended.value.code == 2
    assert "--out_dir: an empty path; name a file or folder" in capsys.readouterr().err


def test_help_is_quick_and_lists_all_commands():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "minimind", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - start < 3  # 0.1 s on a quiet machine
    assert " torch" not in done.stderr
    assert all(name in done.stdout and command.purpose in done.stdout for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimind"])
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: minimind {name} " in capsys.readouterr().out


def test_a_group_lists_its_commands(capsys):
    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "export peft" in shown
    assert "import peft" not in shown


@pytest.mark.parametrize(
    ("argv", "message", "listed"),
    [
        ([], "name a command", "export peft"),
        (["pretrian"], "there is no command 'pretrian'", "export peft"),
        (["pretrian", "--help"], "there is no command 'pretrian'", "export peft"),
        (["train"], "name a command", "train sft"),
        (["train", "sfd", "--epochs", "1"], "there is no command 'train sfd'", "train sft"),
    ],
)
def test_a_wrong_command_is_answered_with_the_list(argv, message, listed, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}\n")
    assert listed in error


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("train sft --help", 0),
        ("completion bash", 0),
        ("chat --out_dir nowhere", 1),
        ("data check nothing.jsonl", 1),
        ("train sft --seed -1", 1),
        ("train sft --nothing 1", 2),
        ("completion powershell", 2),
        ("nothing", 2),
        ("", 2),
    ],
)
def test_exit_codes(words, code):
    """As docs/*/commands.md says them; a user's mistake is one line, not a stack trace."""
    done = subprocess.run(
        [sys.executable, "-m", "minimind", *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("error: ")


def test_characters_that_a_terminal_lacks_are_no_error(tmp_path):
    """As a Chinese path on an English terminal, or one that is not in the terminal's encoding."""
    (tmp_path / "run" / "metrics.jsonl").parent.mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = [sys.executable, "-m", "minimind", "report", str(tmp_path / "run"), "--output"]
    for name, encoding in (
        ("报告.html", "ascii"),
        (b"\xff.html".decode(errors="surrogateescape"), "utf-8:strict"),
    ):
        done = subprocess.run(
            [*command, tmp_path / name],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "?.html  (open it in a browser)" in done.stdout


def test_a_reader_who_leaves_is_no_error():
    """`minimind completion bash | true`"""
    line = f'set -o pipefail; "{sys.executable}" -m minimind completion bash | true'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 141)  # the script may fit the pipe
    assert done.stderr == ""
