"""What a run took, or would take, as people compare it: time, tokens, memory, device and money."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from minimind import environment
from minimind.train.monitor import duration


@dataclass(frozen=True)
class Cost:
    seconds: float
    tokens: int
    peak_memory: int  # bytes of one process: on a GPU those of the GPU, else main memory
    device: str
    price_per_hour: float | None = None  # ¥, of all devices together

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def money(self) -> float | None:
        """¥, or None where no price is known."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def table(self) -> dict[str, Any]:
        """All figures by name, for JSON."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s, "money": self.money}

    def __str__(self) -> str:
        money = "" if self.money is None else f", ¥{self.money:.2f} at ¥{self.price_per_hour:g} an hour"
        return (
            f"{self.tokens:,} tokens in {duration(self.seconds)} ({self.tokens_per_s:,.0f} tokens/s){money}\n"
            f"peak memory {self.peak_memory / 1e9:.2f} GB on {self.device}"
        )


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at once on `device`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else environment.peak_memory()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment.cpu_name()


def total_memory(device: torch.device) -> int:
    """Bytes that `device` has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return environment.machine_memory()
