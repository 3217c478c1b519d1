"""A device's memory: how many rows fit (`--batch_size auto`), and what is said when it runs out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minimind.config import ModelConfig
from minimind.data.batches import PackedDataset
from minimind.errors import UserError
from minimind.files import shown_size
from minimind.train.cost import peak_memory, total_memory
from minimind.train.engine import Engine
from minimind.train.objective import Objective
from minimind.train.parallel import Parallel

# Tokens in a pass on a CPU. With fewer, what a pass costs however small it is (casts of all weights, adding
# up all gradients) takes a larger share; with more, less of what a layer leaves to the next stays in caches.
# 24 rows of 512 took `small` 3.98 s in passes of 4, 3.03 of 8, 3.53 of 12 and 3.73 at once, `base` 9.5 of 3,
# 8.6 of 8 and 8.2 of 12 (two Xeon cores; in turn, medians of 12 and the best of 6). A row of `moe` took 0.37
# s in passes of 5 (3.3 GB at most), 0.36 of 8 (4.6 GB) and 0.33 of 13 (7.6 GB).
CPU_TOKENS = 4096
# With most weights frozen there are no gradients to add up, and smaller passes cost little: 8 rows of LoRA in
# two layers of `small` took 0.58 s of one core at once, 0.57 in passes of 4 and 0.63 of 2 (what this allows).
FROZEN_TOKENS = 1024
GPU_PASS = 0.5  # share of a GPU's memory
ELSEWHERE = 32  # rows
USABLE = {"cuda": 0.92, "cpu": 0.8}  # share of the memory; the rest is for fragments, and for others
FEW, MORE = 2, 4  # rows that are tried
OPTIMIZER_BYTES = 8  # for each trained parameter: AdamW's two moments, which the first step allocates


@contextmanager
def memory_errors_explained(parallel: Parallel) -> Iterator[None]:
    """Turn running out of memory into a UserError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory on {parallel.device}; lower --batch_size (and raise --accumulation_steps as "
            "much), --max_seq_len or the size of the model"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, a CPU allocation only a sentence."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_weights_fit(config: ModelConfig, device: torch.device) -> None:
    """Raises: UserError when a model of this shape is too large to be made and brought to `device`."""
    size = 4 * config.num_parameters
    for place in {torch.device("cpu"), device}:
        if size > total_memory(place):
            raise UserError(
                f"the weights of {config.num_hidden_layers:,} layers of width {config.hidden_size:,} take "
                f"{shown_size(size)}, but {place} has {shown_size(total_memory(place))}; lower "
                "--num_hidden_layers or --hidden_size"
            )


def rows_worthwhile(
    config: ModelConfig, length: int, device: torch.device, mostly_frozen: bool = False
) -> int:
    """The most rows of `length` tokens in a pass, however many more are asked for.

    A CPU answers a signal between two passes. A GPU waits less the larger they are (an H100 trained `small`
    at 797,000 tokens/s with 128 rows at once, at 624,000 with 32), so there it is what surely fits.
    """
    if device.type == "cpu":
        return max(1, (FROZEN_TOKENS if mostly_frozen else CPU_TOKENS) // length)
    if device.type != "cuda":
        return ELSEWHERE
    return max(1, int(GPU_PASS * total_memory(device) / (activation_bytes(config) * length)))


def activation_bytes(config: ModelConfig) -> int:
    """About what a token's forward pass leaves for the backward pass.

    Measured, compiled and in bf16: 23 KB for a layer of `base`, 12 of `small` (this: 25 and 17).
    """
    mlps = config.num_experts_per_tok + config.num_shared_experts if config.num_experts else 1
    layer = 14 * config.hidden_size + 7 * mlps * config.intermediate_size
    return config.num_hidden_layers * layer + 16 * config.vocab_size


def rows_that_fit(engine: Engine, objective: Objective, data: PackedDataset, most: int) -> int:
    """The most rows, up to `most`, whose forward and backward fit into memory beside all else.

    Memory grows linearly with the rows, so it is measured at few and extrapolated: on a CPU, running out of
    it ends the process. All processes call this, and get the number of the one with the least room.
    Raises: UserError when not even one row fits.
    """
    parallel = engine.parallel
    few, more = (measured(engine, objective, data, rows) for rows in (FEW, MORE))
    row = max(1.0, (more - few) / (MORE - FEW))
    trained = sum(p.numel() for group in engine.optimizers for g in group.param_groups for p in g["params"])
    sharers = parallel.world_size if parallel.sharded else 1
    base = few - FEW * row + OPTIMIZER_BYTES * trained / sharers
    room = usable_memory(parallel.device)
    fits = min(parallel.gather(int((room - base) / row)))
    if fits < 1:
        raise UserError(
            f"not even one row fits into the {room / 1e9:.1f} GB that {parallel.device} has to spare; lower "
            "--max_seq_len or the size of the model"
        )
    # As many passes as that takes, all of the same size.
    return math.ceil(most / math.ceil(most / min(fits, most)))


def measured(engine: Engine, objective: Objective, data: PackedDataset, rows: int) -> int:
    """Peak memory in bytes of a forward and backward pass, whose gradients are dropped."""
    parallel = engine.parallel
    batch = data.batch(0, 0, min(rows, data.num_rows), min_rows=rows).to(parallel.device)
    reset_peak(parallel.device)
    with engine.accumulate(more_to_come=True), parallel.autocast():
        loss = objective.loss(engine.trained, batch, engine.model.config.router_aux_loss_coef)
        engine.backward(loss.total)
    peak = peak_memory(parallel.device)
    engine.discard()
    return peak


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:  # of Linux; elsewhere the peak only grows, and the estimate may be too high
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def usable_memory(device: torch.device) -> float:
    """Bytes that this process may hold in all."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) * USABLE["cuda"]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return total_memory(device) * USABLE["cpu"] / processes
