"""Where a run computes: device, precision and the processes it is spread over."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from minimind.errors import UserError
from minimind.train.watchdog import Watchdog

# PyTorch's own limit of a wait, beyond `--hang_timeout`, so that the watchdog's clear message comes first. It
# alone holds for what comes before the first step, where one process may have much more to do than another.
PREPARATION = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """One process's place in the run."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # FSDP2 or ZeRO: no process holds the whole training state
    zero_stage: int = 0  # how much of it DeepSpeed's ZeRO splits; 0: the run goes without DeepSpeed
    cpu_group: dist.ProcessGroup | None = None  # of all processes, for talk beside the training's
    watchdog: Watchdog | None = None  # of a run of several processes
    store: dist.Store | None = None  # where they met

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast | nullcontext:
        """Matrix products in `dtype`; named explicitly, since autocast's own default differs by device."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes; with one they stay where they are, and nothing waits."""
        if self.world_size == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def zeros(self, count: int) -> Tensor:
        """(count,) in fp64, for sums; on the device, or beside one that has no fp64: a Mac's GPU."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return torch.zeros(count, dtype=torch.float64, device=device)

    def any(self, condition: bool) -> bool:
        """Whether `condition` holds in any process, so that all leave a loop together."""
        if self.world_size == 1:
            return condition
        return bool(self.sum(torch.tensor(int(condition), device=self.device)).item())

    def from_main(self, value: T) -> T:
        """The main process's `value`, so that all decide the same."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of each process, for all."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def watched(self) -> contextlib.AbstractContextManager:
        """Around the steps of a run: a process that hangs in them is named, and the run ended."""
        return self.watchdog or nullcontext()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Tell the watchdog that this process gets on; all call this at the same places of the loop."""
        if self.watchdog:
            self.watchdog.beat(doing, step)

    def see_the_same(self, folder: Path) -> bool:
        """Whether `folder` is one folder for all processes, on a disk that their machines share."""
        if self.world_size == 1:
            return True
        probe = folder / ".seen_by_all"
        if self.is_main:
            probe.touch()
        self.barrier()
        found = not self.any(not probe.exists())
        self.barrier()
        if self.is_main:
            probe.unlink()
        return found

    @contextlib.contextmanager
    def errors_once(self) -> Iterator[None]:
        """Have a UserError that several processes come upon, such as a bad record, told by one of them."""
        try:
            yield
        except UserError as error:
            if self.store and self.store.add(f"told: {error}", 1) > 1:
                time.sleep(5)  # the launcher ends this process as soon as the one that tells it has ended
                raise SystemExit(1) from None
            raise

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        self.barrier()  # destroying a group while a peer still talks aborts it
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(
    device: str,
    dtype: str,
    strategy: str | None = None,
    hang_timeout: float = 600.0,
    zero_stage: int = 0,
) -> Parallel:
    """Join the processes of a launcher, if there is one, and settle device and precision.

    Args:
        strategy: "fsdp" for one model over all processes, otherwise each has a whole one.
        hang_timeout: seconds without progress after which the watchdog ends a run of several processes.
        zero_stage: what DeepSpeed is to split, which it does for a single process too.
    """
    rank, world_size = launched("RANK", 0), launched("WORLD_SIZE", 1)
    chosen = choose_device(device, launched("LOCAL_RANK", 0) if world_size > 1 else None)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    store = watchdog = None
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if world_size > 1:
        limit = timedelta(seconds=hang_timeout) + PREPARATION
        launchers, *_ = next(rendezvous("env://", timeout=limit))
        # A launcher that starts the processes again keeps its store, with the addresses of the dead in it.
        store = dist.PrefixStore(f"start {launched('TORCHELASTIC_RESTART_COUNT', 0)}", launchers)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        watchdog = Watchdog(dist.PrefixStore("watchdog", store.clone()), rank, world_size, hang_timeout)  # type: ignore[attr-defined]
    elif zero_stage:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    sharded = zero_stage > 0 or (strategy == "fsdp" and world_size > 1)
    cpu_group = dist.new_group(backend="gloo") if sharded else None
    precision = choose_dtype(dtype, chosen)
    return Parallel(chosen, precision, rank, world_size, sharded, zero_stage, cpu_group, watchdog, store)


def launched(name: str, default: int) -> int:
    """A number that a launcher tells its processes. Raises: UserError when it is none."""
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {value!r}, but launchers like torchrun set it to a number; "
            "unset it to train in one process"
        ) from None


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step instead of giving them back to the system.

    By default each large tensor is mapped anew, and the kernel clears its pages first: measured at a
    quarter of a training step on two CPU cores. Other C libraries are left as they are.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 << 20)


def return_freed_memory() -> None:
    """Have glibc give all freed memory back once: after a preparation, whose remains steps use little of."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the GPU where there is one. Under a launcher each process takes its own.

    Raises: UserError for a device that this machine or this build of PyTorch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if local_rank is not None else device.index or 0
        if index >= count:
            raise UserError(f"--device {name}: PyTorch sees {count} CUDA device(s) here; use --device cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.mps.is_available():
        raise UserError("--device mps: there is no Apple GPU here; use --device cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device has it, else fp32.

    Raises: UserError for fp16 on a CPU, which has no fast fp16 products.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype float16 does not work on a CPU; use --dtype bfloat16 or auto")
    return getattr(torch, name)
