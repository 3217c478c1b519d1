"""R1-style reasoning distillation: learn to think in `<think>…</think>` before an `<answer>…</answer>`.

The answers were written by a larger reasoning model, DeepSeek-R1 for one (arXiv:2501.12948, 2.4), so this is
fine-tuning. A small model easily forgets the tags: their tokens weigh more in the training loss (and in its
mean) than the others. Scores on held-out data weigh all alike, so the two do not compare.

    python trainer/train_distill_reason.py                               from out/rlhf_512.pth, else full_sft
    python trainer/train_distill_reason.py --from_weight full_sft        without the DPO stage
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.errors import UserError
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR
from minimind.train.options import BATCH_SIZE, TrainOptions

if TYPE_CHECKING:
    from minimind.train.loop import Stage


@dataclass(frozen=True)
class ReasonOptions(TrainOptions):
    data_path: Path = flag(DATASET_DIR / "r1_mix_1024.jsonl", "JSONL file to train on, plain or .gz")
    max_seq_len: int = flag(1024, "length of a row in tokens")
    batch_size: int = flag(8, BATCH_SIZE, word="auto")
    accumulation_steps: int = flag(1, "batches of batch_size in one optimizer step, over all devices")
    tag_weight: float = flag(10.0, "weight of the tags' tokens in the loss; all others have 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tag_weight <= 1e6:  # refuses NaN too; the loss is summed in fp32
            raise UserError(f"--tag_weight is {self.tag_weight}; it must be above 0 and at most 1e6")


def stage(options: ReasonOptions) -> Stage:
    from minimind.train.loop import Stage

    return Stage(
        "reason",
        data_kind="reasoning",
        starts_from=("rlhf", "full_sft"),
        tag_weight=options.tag_weight,
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(ReasonOptions, argv, __doc__)
    from minimind.train.loop import train  # PyTorch loads after --help has answered

    return train(stage(options), options)
