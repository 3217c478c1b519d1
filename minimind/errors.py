"""The one exception that is shown to a person as a sentence instead of a stack trace."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and the mend."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit code.

    A `UserError` is printed as one message on stderr and exits with 1; Ctrl-C exits with 130. Anything
    else is a bug in MiniMind and keeps its stack trace.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `… | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
