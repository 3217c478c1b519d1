"""The training stages, one short file each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minimind.paths import OUT_DIR

SCRIPTS = {  # stage, which is also the first part of its weight files' names -> what makes them
    "pretrain": "trainer/train_pretrain.py",
    "full_sft": "trainer/train_full_sft.py",
    "lora": "trainer/train_lora.py",
    "rlhf": "trainer/train_dpo.py",
    "reason": "trainer/train_distill_reason.py",
    "full_dist": "trainer/train_distillation.py",
}


def command(script: str, flags: Mapping[str, object], out_dir: Path) -> str:
    """How to make what is missing, for messages."""
    given = "".join(f" --{name} {value}" for name, value in flags.items())
    return f"python {script}{given}" + ("" if out_dir == OUT_DIR else f" --out_dir {out_dir}")
