"""The GPU benchmark's figures as shares of what the card can do, and as a table."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.speed import EPOCH_TOKENS
from minimind.environment import cpu_name
from minimind.estimate import GPUS

# Of the same name and another rate.
VARIANTS = {"Ti", "SUPER", "Super", "Laptop", "Max-Q", "PCIe", "NVL", "D"}


def card_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def data_sheet(card: str) -> float | None:
    """Floating-point operations a second in bf16 by the data sheet of `card`, None where it is not known."""
    words = set(re.split(r"[ -]", card))
    if "NVIDIA" not in words or words & VARIANTS:
        return None
    found = [gpu.tflops * 1e12 for name, gpu in GPUS.items() if set(name.split("-")) <= words]
    return found[0] if found else None


def with_shares(results: dict[str, Any], card: str) -> dict[str, Any]:
    """`results` with both peak rates, each row's MFU against them, and the hours of an epoch."""
    measured = results["matmul_bf16"]
    measured = None if isinstance(measured, dict) else measured  # a fault, which `speed` has too
    peaks = {"measured": measured, "data_sheet": data_sheet(card)}

    def shares(row: dict[str, Any]) -> dict[str, Any]:
        if "error" in row:
            return row
        flops = row["flops_per_token"] * row["tokens_per_s"]
        return row | {f"mfu_{name}": peak and flops / peak for name, peak in peaks.items()}

    speed = [shares(row) for row in results["speed"]]
    rate = speed[0].get("tokens_per_s")
    hours = {
        "extrapolated": rate and EPOCH_TOKENS / rate / 3600,
        "from_the_stretch": results["stretch"].get("epoch_h"),
    }
    return results | {"peak_flops": peaks, "speed": speed, "epoch_hours": hours}


def show(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(checks_table(results["checks"]), speed_table(results), sep="\n")
    run, hours = results["stretch"], results["epoch_hours"]
    for name, value in hours.items():
        shown = f"{60 * value:.1f} minutes" if value else f"unknown ({run.get('error', 'see above')})"
        console.print(f"one epoch of pretrain_hq ({EPOCH_TOKENS:,.0f} tokens) on small, {name}: {shown}")
    if "error" not in run:
        console.print(
            f"the stretch: {run['steps']} steps in {run['run_s']:.0f} s, of which {run['rest_s']:.0f} s were "
            "start, compiling, evaluations, saving and report; "
            f"loss {run['first_loss']:.3f} → {run['last_loss']:.3f}"
        )


def checks_table(checks: list[dict[str, Any]]) -> Table:
    table = Table("model", "check", "found", "at most", "", title="against the CPU")
    for row in checks:
        value = row.get("error") or f"{row['value']:.2g}"
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        table.add_row(row["model"], row["check"], value, limit, "ok" if row["passed"] else "[red]FAILED")
    return table


def speed_table(results: dict[str, Any]) -> Table:
    rates = [f"{n}: {p / 1e12:.4g} TFLOP/s" for n, p in results["peak_flops"].items() if p]
    title = f"{results['card']} · bf16 peak {', '.join(rates)}"
    columns = (
        "",
        "useful tokens/s",
        "MFU measured",
        "MFU data sheet",
        "peak GB",
        "rows (at once)",
        "step s",
        "compile s",
    )
    table = Table(*columns, title=title + (" · DRY RUN, no speeds" if results["dry_run"] else ""))
    for row in results["speed"]:
        name = f"{row['stage']} {row['preset']}"
        if "error" in row:
            table.add_row(name, row["error"], style="red")
            continue
        mfu = [f"{row[key]:.1%}" if row[key] else "unknown" for key in ("mfu_measured", "mfu_data_sheet")]
        rows = "{} ({}) × {}".format(row["rows"][0], row["rows_at_once"], row["rows"][1])
        speed, memory = f"{row['tokens_per_s']:,.0f}", f"{row['peak_gb']:.2f}"
        table.add_row(name, speed, *mfu, memory, rows, f"{row['step_s']:.3f}", f"{row['compile_s']:.0f}")
    return table
