"""Pretraining: learn to continue text. Every token but a document's first is a target.

Reads {"text": …} records and writes out/pretrain_512.pth, where 512 is the width of the model.

    python trainer/train_pretrain.py                      on dataset/pretrain_hq.jsonl
    python trainer/train_pretrain.py --preset tiny --batch_size 8 --max_steps 100      a quick try
    python trainer/train_pretrain.py --from_resume 1      goes on where it was stopped
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR
from minimind.train.options import TrainOptions

if TYPE_CHECKING:
    from minimind.train.loop import Stage


@dataclass(frozen=True)
class PretrainOptions(TrainOptions):
    # Swept at `tiny` and `small`, see benchmarks/LOG.md.
    LEARNING_RATES: ClassVar[dict[str, float]] = {"muon": 2.5e-3, "adamw": 1e-3}
    EMBEDDING_RATE: ClassVar[float] = 6.0
    data_path: Path = flag(DATASET_DIR / "pretrain_hq.jsonl", "JSONL file to train on, plain or .gz")
    learning_rate: float | None = flag(
        None, "highest learning rate; without it 0.0025 with muon, 0.001 with adamw"
    )


def stage(options: PretrainOptions) -> Stage:
    from minimind.train.loop import Stage

    return Stage("pretrain", data_kind="pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(PretrainOptions, argv, __doc__)
    from minimind.train.loop import train  # PyTorch loads after --help has answered

    return train(stage(options), options)
