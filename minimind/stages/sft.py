"""Supervised fine-tuning: learn to answer. Targets are the assistant's words and the token that ends them.

Reads {"conversations": […]} records, starts from pretrained weights and writes out/full_sft_512.pth.

    python trainer/train_full_sft.py                                             from out/pretrain_512.pth
    python trainer/train_full_sft.py --data_path my_chats.jsonl --epochs 3       on data of one's own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR
from minimind.train.options import BATCH_SIZE, TrainOptions

if TYPE_CHECKING:
    from minimind.train.loop import Stage


@dataclass(frozen=True)
class SFTOptions(TrainOptions):
    data_path: Path = flag(DATASET_DIR / "sft_mini_512.jsonl", "JSONL file to train on, plain or .gz")
    epochs: int = flag(2, "passes over the data")
    # At 512 an eighth of sft_mini_512's answer tokens would be cut off, at 1024 half a percent.
    max_seq_len: int = flag(1024, "length of a row in tokens")
    batch_size: int = flag(8, BATCH_SIZE, word="auto")
    accumulation_steps: int = flag(1, "batches of batch_size in one optimizer step, over all devices")


def stage(options: SFTOptions) -> Stage:
    from minimind.train.loop import Stage

    return Stage("full_sft", data_kind="conversation", starts_from=("pretrain",))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(SFTOptions, argv, __doc__)
    from minimind.train.loop import train  # PyTorch loads after --help has answered

    return train(stage(options), options)
