"""`python train_distill_reason.py` — see minimind/stages/reason.py, and `--help` for its flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without installing the package

from minimind.errors import run_cli

MAIN = "minimind.stages.reason:main"

if __name__ == "__main__":
    run_cli(MAIN)
