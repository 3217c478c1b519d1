"""`python train_distillation.py` — the stage is minimind/stages/distill.py, `--help` shows its flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without installing the package

from minimind.errors import run_cli

MAIN = "minimind.stages.distill:main"

if __name__ == "__main__":
    run_cli(MAIN)
