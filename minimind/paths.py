"""Where things are, from whatever folder a command is started."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the checkout; the seed's scripts are run from it or from trainer/
DATASET_DIR = ROOT / "dataset"
OUT_DIR = ROOT / "out"
TOKENIZER_DIR = PACKAGE / "assets" / "tokenizer"
