"""LoRA: fine-tune small adapters beside the frozen model, for a topic or a manner (see minimind/lora.py).

Reads conversations from dataset/{lora_name}.jsonl and writes out/lora/{lora_name}_512.pth.

    python trainer/train_lora.py --lora_name lora_identity --epochs 50     on dataset/lora_identity.jsonl
    python trainer/train_lora.py --lora_rank 4 --lora_targets q_proj,v_proj
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.errors import UserError
from minimind.flags import flag, parse_flags
from minimind.paths import DATASET_DIR
from minimind.train.options import BATCH_SIZE, TrainOptions

if TYPE_CHECKING:
    from minimind.train.loop import Stage


@dataclass(frozen=True)
class LoRAOptions(TrainOptions):
    data_path: Path | None = flag(None, "JSONL file to train on; without it dataset/{lora_name}.jsonl")
    epochs: int = flag(10, "passes over the data; a hundred records want 50")
    # Small sets need steps more than they need large batches.
    batch_size: int = flag(8, BATCH_SIZE, word="auto")
    accumulation_steps: int = flag(1, "batches of batch_size in one optimizer step, over all devices")
    optimizer: str = flag(
        "adamw", "muon: Muon for matrices, AdamW for the rest", choices=("auto", "muon", "adamw")
    )
    learning_rate: float = flag(2e-3, "highest learning rate")
    weight_decay: float = flag(0.0, "decoupled weight decay of the adapters' matrices")
    lora_name: str = flag("lora_medical", "what the adapters are called: out/lora/{lora_name}_512.pth")
    lora_rank: int = flag(8, "rank of the adapters")
    lora_targets: str = flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "projections that get an adapter"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.lora_name)
        if not 1 <= self.lora_rank <= 1024:
            raise UserError(f"--lora_rank is {self.lora_rank}; it must be 1 to 1024")
        if self.data_path is None:
            object.__setattr__(self, "data_path", DATASET_DIR / f"{self.lora_name}.jsonl")


def check_name(lora_name: str) -> None:
    """Raises: UserError for what cannot be part of a file's name."""
    if not lora_name or set(lora_name) & set("/\\\0") or lora_name[0] == "." or len(lora_name.encode()) > 150:
        raise UserError(
            f"--lora_name is {lora_name[:200]!r}; give a short name that begins with no dot and has no / and "
            "\\ in it, such as lora_medical"
        )


def check_names(lora_names: Sequence[str]) -> None:
    """Raises: UserError for a name that is none, or that comes twice."""
    for name in lora_names:
        check_name(name)
        if list(lora_names).count(name) > 1:
            raise UserError(f"--lora_name names {name} twice; its adapters would be added twice")


def stage(options: LoRAOptions) -> Stage:
    from minimind.lora import attach, save_lora
    from minimind.train.loop import Stage

    return Stage(
        f"lora/{options.lora_name}",
        data_kind="conversation",
        starts_from=("full_sft",),
        prepare=partial(attach, rank=options.lora_rank, targets=options.lora_targets.split(",")),
        save=save_lora,
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_flags(LoRAOptions, argv, __doc__)
    if options.from_weight == "none":
        raise UserError("--from_weight none: an adapter needs trained weights beside it; name a stage")
    from minimind.train.loop import train  # PyTorch loads after --help has answered

    return train(stage(options), options)
