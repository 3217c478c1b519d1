"""Where a training run keeps what it says of itself: `runs/{name}/run.json` beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN = "run.json"


def run_folder(weights: Path) -> Path:
    """The folder of the run that made `weights`."""
    return weights.parent / "runs" / weights.stem


def read_run(weights: Path) -> dict[str, Any]:
    """Its settings and results; empty for weights that came without, or where the file is damaged."""
    try:
        run = json.loads((run_folder(weights) / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return run if isinstance(run, dict) else {}
