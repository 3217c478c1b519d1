"""Where things are, from whatever folder a command is started."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the checkout; the seed's scripts are run from it or from trainer/
DATASET_DIR = ROOT / "dataset"
OUT_DIR = ROOT / "out"
TOKENIZER_DIR = PACKAGE / "assets" / "tokenizer"


def pip_install(extra: str) -> str:
    """The command that installs what a part of the project needs, for messages.

    From this checkout: under its mere name the package index has another project.
    """
    return f"pip install -e '{ROOT}[{extra}]'"
