"""TRL's trainers, held after each optimizer step until the next is asked for.

Its loop runs in a thread, whole and unchanged: `Trainer.train()` with a callback that waits in `on_step_end`.
Gradient checkpointing, which TRL turns on to save memory, is off: it costs a second forward pass.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.side_by_side import Work, note
from minimind.data.records import read_records
from minimind.environment import peak_memory
from minimind.tokenizer import Tokenizer
from minimind.train.parallel import has_fast_bfloat16


def arguments(folder: Path, rows: int, passes: int, max_length: int) -> dict[str, Any]:
    """What both trainers are told; the rest are TRL's defaults."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
        "max_length": max_length,
        "max_steps": 10**6,  # it never gets there
        "bf16": has_fast_bfloat16(torch.device("cpu")),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Counted:
    """Mixed into a trainer: counts useful tokens, and times what is done once before training."""

    useful, once = 0, 0.0

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        self.useful += useful_tokens(inputs)
        return super().training_step(model, inputs, *args)

    def _precompute_ref_logps(self, *args: Any) -> datasets.Dataset:
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args)
        self.once = time.perf_counter() - began
        return dataset


def useful_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that have a next one in their record: all but the last of each.

    Without an attention mask the batch is one row of whole records, whose positions begin at 0 each.
    """
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum()) - len(inputs["attention_mask"])
    positions = inputs["position_ids"]
    return positions.numel() - int((positions == 0).sum())


class CountedSFT(Counted, SFTTrainer):
    pass


class CountedDPO(Counted, DPOTrainer):
    pass


class Hold(TrainerCallback):
    """Lets a trainer's loop make one step at a time."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.go.acquire()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.release()
        self.go.acquire()


def steps_of(build: Callable[[], Counted], notes: Path) -> Work:
    """One optimizer step of the trainer that `build` makes, in the first call; returns its useful tokens."""
    hold = Hold()
    trainer: Counted | None = None
    failures: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failures.append(error)
            hold.done.release()

    def step() -> int:
        nonlocal trainer
        if trainer is None:  # not before its turn, to disturb nobody
            trainer = build()
            trainer.add_callback(hold)
            threading.Thread(target=train, daemon=True).start()
        trainer.useful = 0
        began = time.perf_counter()
        hold.go.release()
        hold.done.acquire()
        if failures:
            raise failures[0]
        took = time.perf_counter() - began
        note(notes, tokens=trainer.useful, seconds=took, once_s=trainer.once, peak_bytes=peak_memory())
        return trainer.useful

    return step


def sft_steps(model: Path, data: Path, max_length: int, rows: int, packing: bool, folder: Path) -> Work:
    """`SFTTrainer` on our tokens of the records, with its own packing or, by default, padding.

    Packed rows are passed one at a time: TRL joins those of a pass into one row, and without flash-attention
    the mask over it grows with the square of its length.
    """

    def build() -> CountedSFT:
        batch = (1, rows) if packing else (rows, 1)
        return CountedSFT(
            model=str(model),
            args=SFTConfig(**arguments(folder, *batch, max_length), packing=packing),
            train_dataset=conversations(data),
        )

    return steps_of(build, folder / f"{'packing' if packing else 'trl'}.jsonl")


def conversations(path: Path) -> datasets.Dataset:
    tokenizer = Tokenizer.load()
    rows = []
    for _, record in read_records(path, "conversation"):
        ids, targets = tokenizer.encode_chat(record.conversations)
        labels = [i if target else -100 for i, target in zip(ids, targets, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(rows)


def dpo_steps(model: Path, data: Path, max_length: int, pairs: int, precompute: bool, folder: Path) -> Work:
    """`DPOTrainer` on the records as they are."""
    datasets.disable_caching()  # a reference found in a cache would have cost nothing
    notes = folder / f"{'precompute' if precompute else 'trl'}.jsonl"

    def build() -> CountedDPO:
        rows = [
            {"chosen": record.chosen, "rejected": record.rejected}
            for _, record in read_records(data, "preference")
        ]
        args = DPOConfig(
            **arguments(folder, pairs, 1, max_length), precompute_ref_log_probs=precompute, beta=0.1
        )
        trainer = CountedDPO(
            model=str(model),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        note(notes, data_tokens=sum(map(pair_tokens, trainer.train_dataset)))
        return trainer

    return steps_of(build, notes)


def pair_tokens(example: dict[str, Any]) -> int:
    """Useful tokens of both answers, each after the prompt."""
    lengths = {part: len(example[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")}
    return 2 * lengths["prompt"] + lengths["chosen"] + lengths["rejected"] - 2
