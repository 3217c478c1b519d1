"""One optimizer step: the passes over its batches, their gradients, and the update, or why there is none."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minimind.data.batches import Batch
from minimind.errors import UserError
from minimind.train import report
from minimind.train.memory import is_out_of_memory
from minimind.train.objective import Loss
from minimind.train.optim import learning_rate_scale
from minimind.train.parallel import Parallel
from minimind.train.signals import Interrupted, StopSignals

if TYPE_CHECKING:
    from minimind.train.loop import Trainer


def optimizer_step(
    trainer: Trainer, step: int, batches: list[Batch], signals: StopSignals
) -> dict[str, float] | None:
    """One update from `batches`; returns what to log, or None when memory ran out: less is to be tried.

    A step that would harm the weights is left out. Raises: Interrupted on a signal, the weights being
    those before the step.
    """
    began, parallel = time.perf_counter(), trainer.parallel
    parallel.beat("counting its tokens", step + 1)
    own = (
        sum(b.row_units.sum().item() for b in batches),
        sum((b.document_ids >= 0).sum().item() for b in batches),
        signals.received is not None,
    )
    units, tokens, asked = parallel.sum(torch.tensor(own, dtype=torch.float64)).tolist()
    if asked:  # in whichever process
        raise Interrupted

    try:
        # Within one context all passes share the weights' casts. Sharded weights come and go in each.
        # No pass may run the trained model without gradients first: its casts, kept, would have none.
        with nullcontext() if parallel.sharded else parallel.autocast():
            losses = accumulate_gradients(trainer, batches, units, signals)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        losses = None  # and out of this block, where the error still holds the memory
    if losses is None:
        take_less_at_once(trainer)
        return None
    parallel.beat("optimizer step")
    grad_norm, (loss, *means) = measured(trainer, batches, losses, units)
    scale = trainer.stability.rate * learning_rate_scale(step, trainer.total_steps, trainer.warmup_steps)
    # A gradient scaler leaves steps out by itself, until it has found its scale.
    scaled = trainer.engine.scaler.is_enabled()
    objection = trainer.stability.objection(loss, units, 0.0 if scaled else grad_norm)
    if objection:
        trainer.say(report.left_out(trainer, step, batches, losses, scale, objection))
        trainer.engine.skip()
    elif scaled and not math.isfinite(grad_norm):
        trainer.engine.skip()  # the whole step, and not only the optimizer whose gradients overflowed
    else:
        trainer.engine.step(scale)

    rate = tokens / (time.perf_counter() - began)
    assert trainer.options.learning_rate is not None  # the options are settled
    logged = {
        "loss": loss,
        "lr": trainer.options.learning_rate * scale,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_s": rate,
        "mfu": trainer.flops_per_token * rate / parallel.world_size / trainer.peak_rate,
        "epoch": trainer.shares.epoch(step),
        "skipped": trainer.stability.skipped,
    }
    return logged | dict(zip(losses[0].metrics, means, strict=True))


def take_less_at_once(trainer: Trainer) -> None:
    """After running out of memory: the same steps, in passes of half as many rows.

    Raises: MemoryError with one row a pass, and UserError under several processes and DeepSpeed: they
    have stopped in the middle of an exchange, and only a new start brings them together.
    """
    parallel = trainer.parallel
    rows, step_rows = trainer.shares.rows_at_once, trainer.shares.rows_per_step
    if rows == 1:
        raise MemoryError
    half = math.ceil(rows / 2)
    flags = f"--batch_size {half} --global_batch_size {step_rows}"
    if parallel.world_size > 1 or parallel.zero_stage:
        raise UserError(
            f"not enough memory on {parallel.device} for {rows} rows at once; start again with "
            f"{flags} (the same training) or --batch_size auto"
        )
    trainer.engine.discard()
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
    trainer.shares = dataclasses.replace(trainer.shares, batch_size=half)
    trainer.say(f"not enough memory for {rows} rows at once; on with {half}, in steps as before ({flags})")


def must_stop(parallel: Parallel, signals: StopSignals) -> bool:
    """Whether to end before a pass. On a CPU a step is long, and to ask the others costs little."""
    asked = signals.received is not None
    if parallel.world_size == 1 or parallel.device.type != "cpu":
        return asked and parallel.world_size == 1
    return parallel.any(asked)


def measured(
    trainer: Trainer, batches: list[Batch], losses: list[Loss], units: float
) -> tuple[float, list[float]]:
    """Clips the gradients; returns their norm before, the step's loss and the objective's metrics.

    The latter are means over the units of all batches of all processes. A GPU is waited for here and
    nowhere else in a step, after all its passes; so the numbers come in one tensor.
    """
    norm, parallel = trainer.engine.clip(), trainer.parallel
    values = torch.stack([torch.stack([x.logged, *x.metrics.values(), norm]) for x in losses])
    # Fp64 for the sums; a Mac's GPU has none.
    values = values.to("cpu" if parallel.device.type == "mps" else parallel.device).double()
    loss_sum = values[:, :1].sum(dim=0)  # (1,)
    counts = [batch.row_units.sum().item() for batch in batches]
    sums = sum(row[1:-1] * count for row, count in zip(values, counts, strict=True))  # (metrics,)
    sums = parallel.sum(torch.cat((loss_sum, sums)))
    *numbers, grad_norm = on_host(torch.cat((sums, values[0, -1:])), meanwhile=trainer.engine.prepare)
    return grad_norm, [number / max(units, 1) for number in numbers]


def on_host(values: Tensor, meanwhile: Callable[[], None]) -> list[float]:
    """`values` as numbers. A GPU has what `meanwhile` gives it to do until these have led to something."""
    if values.device.type != "cuda":
        meanwhile()
        return values.tolist()
    numbers = values.to("cpu", non_blocking=True)
    known = torch.cuda.Event()
    known.record()
    meanwhile()
    known.synchronize()
    return numbers.tolist()


def accumulate_gradients(
    trainer: Trainer, batches: list[Batch], units: float, signals: StopSignals
) -> list[Loss]:
    """Forward and backward of each batch; `units` is what the loss is a mean over, of the whole step."""
    parallel, losses = trainer.parallel, []
    for i, batch in enumerate(batches):
        if must_stop(parallel, signals):
            raise Interrupted
        more_to_come = i + 1 < len(batches)
        parallel.beat(f"forward pass {i + 1} of {len(batches)}")
        with trainer.engine.accumulate(more_to_come), parallel.autocast():
            batch = batch.to(parallel.device, non_blocking=True)
            loss = trainer.objective.loss(trainer.engine.trained, batch, trainer.config.router_aux_loss_coef)
            parallel.beat(f"backward pass {i + 1} of {len(batches)}")
            # Processes' gradients are averaged, but the step's loss is a sum over them.
            trainer.engine.backward(loss.total * (parallel.world_size / max(units, 1)))
        losses.append(loss._replace(total=loss.total.detach()))
    return losses
