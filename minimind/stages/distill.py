"""White-box distillation: a small student learns from a larger, frozen teacher's probabilities.

Reads conversations, starts from full_sft, else pretrain, and writes out/full_dist_512.pth.

    python trainer/train_distillation.py --teacher_preset base           out/full_sft_768.pth teaches
    python trainer/train_distillation.py --teacher_path other.pth --alpha 0.3 --temperature 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import PRESETS
from minimind.errors import UserError
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR
from minimind.stages import SCRIPTS, command
from minimind.stages.sft import SFTOptions

if TYPE_CHECKING:
    from minimind.train.loop import Stage


@dataclass(frozen=True)
class DistillOptions(SFTOptions):
    data_path: Path = flag(DATASET_DIR / "sft_mini_512.jsonl", "JSONL file to train on, plain or .gz")
    teacher_preset: str = flag("base", "size of the teacher, full_sft weights in out_dir", choices=[*PRESETS])
    teacher_path: Path | None = flag(None, "weight file of another teacher, of any size")
    alpha: float = flag(0.5, "share of the data's own words in the loss; the rest is the teacher's")
    temperature: float = flag(1.0, "above 1 flattens both distributions before they are compared")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha is {self.alpha}; it must be 0 (teacher alone) to 1 (data alone)")
        if not 0.01 <= self.temperature <= 100:
            raise UserError(f"--temperature is {self.temperature}; it must be 0.01 to 100")

    @property
    def teacher(self) -> Path:
        return self.teacher_path or self.out_dir / f"full_sft_{PRESETS[self.teacher_preset].name}.pth"


def stage(options: DistillOptions) -> Stage:
    from minimind.train.distillation import Distillation
    from minimind.train.loop import Stage

    if options.teacher_path and not options.teacher_path.is_file():
        raise UserError(f"--teacher_path {options.teacher_path}: there is no such weight file")
    make = command(SCRIPTS["full_sft"], {"preset": options.teacher_preset}, options.out_dir)
    objective = Distillation(options.teacher, make, options.alpha, options.temperature)
    return Stage("full_dist", "conversation", ("full_sft", "pretrain"), objective)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(DistillOptions, argv, __doc__)
    from minimind.train.loop import train  # PyTorch loads after --help has answered

    return train(stage(options), options)
