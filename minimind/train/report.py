"""What a run says of itself: its settings, its first lines, and the records behind a step that went wrong."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimind.data.batches import Batch
from minimind.environment import environment
from minimind.train.compiling import uncompiled
from minimind.train.objective import Loss

if TYPE_CHECKING:
    from minimind.train.loop import Trainer


def settings(trainer: Trainer) -> dict[str, Any]:
    """All that a reader of the run's results needs to know, as plain values."""
    options = {name: plain(value) for name, value in vars(trainer.options).items()}
    return {
        "run_id": trainer.run_id,
        "stage": trainer.stage.name,
        "options": options,
        "started_from": plain(trainer.started_from),
        "model": dataclasses.asdict(trainer.config),
        "parameters": trainer.num_parameters,
        "trainable_parameters": trainer.num_trainable,
        "data_sha256": trainer.data_sha256,
        "data_tokens": trainer.data.num_tokens,
        "data_documents": trainer.data.report.documents,
        "tokenizer_fingerprint": trainer.tokenizer.fingerprint,
        "total_steps": trainer.total_steps,
        "device": str(trainer.parallel.device),
        "dtype": str(trainer.parallel.dtype).removeprefix("torch."),
        "world_size": trainer.parallel.world_size,
        "launcher": os.getppid(),
        "torch": torch.__version__,
        "environment": environment(),
    }


def plain(value: Any) -> Any:
    """`value` as JSON and checkpoints can hold it."""
    return str(value) if isinstance(value, Path) else value


def introduce(trainer: Trainer) -> None:
    """Write `run.json` and say in a few lines what is about to happen."""
    if not trainer.parallel.is_main:
        return
    trainer.write_settings()
    say, report, total = trainer.monitor.say, trainer.data.report, trainer.num_parameters
    part = "" if trainer.num_trainable == total else f"{trainer.num_trainable / 1e6:.2f} M of "
    say(
        f"{trainer.stage.name}: {part}{total / 1e6:.2f} M parameters on "
        f"{trainer.parallel.device}, {str(trainer.parallel.dtype).removeprefix('torch.')}"
        f"{', compiled' if trainer.compiled else ''}; matrix products here run at "
        f"{trainer.peak_rate / 1e9:,.0f} GFLOP/s"
    )
    say(
        f"data: {trainer.data.num_rows:,} rows of {trainer.options.max_seq_len} tokens, "
        f"{trainer.data.padding_fraction:.2%} padding; {trainer.total_steps:,} steps"
    )
    if trainer.parallel.zero_stage:
        say(
            f"DeepSpeed's ZeRO, stage {trainer.parallel.zero_stage}, over {trainer.parallel.world_size} "
            "process(es); the optimizer is adamw, since muon needs whole matrices and ZeRO cuts them up"
        )
    if trainer.started_from:
        say(f"starting from {trainer.started_from}")
    if report.split:
        say(f"data: {report.split:,} texts were split, over two rows or more; nothing is lost")
    if report.dropped and trainer.stage.data_kind == "preference":
        say(
            f"data: of {report.documents:,} pairs {report.dropped:,} are left out, since chosen and "
            f"rejected together are longer than --max_seq_len {trainer.options.max_seq_len}"
        )
    elif report.cut or report.dropped:
        say(
            f"data: {report.cut + report.dropped:,} of {report.documents:,} conversations are longer than "
            f"--max_seq_len {trainer.options.max_seq_len}: {report.cut:,} end after an earlier answer, "
            f"{report.dropped:,} are left out since no answer fits; {report.lost_target_tokens:,} answer "
            "tokens are lost"
        )
    if trainer.held_out is None:
        say("data: no record to hold out that fits, so there is no evaluation; --eval_path names a file")


def left_out(
    trainer: Trainer, step: int, batches: list[Batch], losses: list[Loss], scale: float, objection: str
) -> str:
    """Name the step, the learning rate and the records behind a loss that leaps or is no number."""
    lines = trainer.parallel.gather(suspects(trainer, step, batches, losses))
    shown = ", ".join(map(str, sorted(set().union(*lines))[:20]))
    rate = trainer.options.learning_rate * scale
    return (
        f"step {step + 1} is left out: {objection}; learning rate {rate:.2e}, "
        f"records at {trainer.options.data_path} lines {shown}"
    )


def suspects(trainer: Trainer, step: int, batches: list[Batch], losses: list[Loss]) -> set[int]:
    """Lines of this process's records whose loss is not finite or, failing that, those of its worst."""
    epoch, passes = trainer.shares.epoch(step), trainer.shares.passes(step)
    units = [max(1, batch.row_units.sum().item()) for batch in batches]
    means = [loss.logged.item() / n for loss, n in zip(losses, units, strict=True)]
    rows = [row for i in worst(means) for row in passes[i]]
    if not trainer.parallel.sharded and rows:  # where one process may read alone
        rows = [rows[i] for i in worst([loss_of_row(trainer, epoch, row) for row in rows])]
    return {line for row in rows for line in trainer.data.source_lines(epoch, row)}


@torch.no_grad()
def loss_of_row(trainer: Trainer, epoch: int, row: int) -> float:
    alone = trainer.data.batch(epoch, row, 1).to(trainer.parallel.device)
    # Compiled code for one row, without gradients, would be made for this alone.
    with trainer.parallel.autocast(), uncompiled(trainer.model):
        loss = trainer.objective.loss(trainer.model, alone, 0.0).logged
    return loss.item() / max(1, alone.row_units.sum().item())


def worst(losses: list[float]) -> list[int]:
    """Where `losses` are not finite or, if all are, where they are highest."""
    broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    return broken or [max(range(len(losses)), key=losses.__getitem__)]
