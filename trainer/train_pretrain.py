"""`python train_pretrain.py` — see minimind/stages/pretrain.py for the stage and `--help` for its flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without installing the package

from minimind.errors import run_cli

MAIN = "minimind.stages.pretrain:main"

if __name__ == "__main__":
    run_cli(MAIN)
