"""The one exception that is shown to a person as a sentence instead of a stack trace."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from minimind.paths import ROOT


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and the mend."""


def run_cli(main: Callable[[], int | None] | str) -> None:
    """Run a command's `main` and leave the process with its exit code.

    A `UserError` is printed as one message on stderr and exits with 1, and so does a package that is not
    installed; Ctrl-C exits with 130. Anything else is a bug in MiniMind and keeps its stack trace.

    Args: main: the function, or "module:function", which is then imported here.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        if isinstance(main, str):
            module, _, function = main.partition(":")
            code = getattr(import_module(module), function)() or 0
        else:
            code = main() or 0
        if sys.stdout:  # none where it was closed
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package):
            raise
        print(
            f"error: the package {package} is not installed for {sys.executable}; first: source "
            f"{ROOT}/.venv/bin/activate (`make demo` makes it), or install all with: pip install -e '{ROOT}'",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `… | head`: the reader has seen enough
        discard_output()
        code = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        discard_output()
        print(f"error: {error.strerror}: {error.filename or 'standard output'}", file=sys.stderr)
        code = 1
    sys.exit(code)


def discard_output() -> None:
    """Let what is printed, and what could not be, go nowhere: Python would try it again at the end."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
