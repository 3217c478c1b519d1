"""`minimind report`: what a training run's folder tells, as one HTML page.

The folder, `out/runs/{name}/`, has `run.json` (settings, cost), `metrics.jsonl` (every step) and, once the
run is done, `samples.jsonl` (what the model says). A run that is at work, or was stopped, has a page too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.evaluate.report import read_log, write_report
from minimind.files import check_ending
from minimind.flags import flag, parse_flags
from minimind.paths import OUT_DIR
from minimind.runs import LOG, RUN

SAMPLES, REPORT = "samples.jsonl", "report.html"


@dataclass(frozen=True)
class ReportOptions:
    run_dir: Path | None = flag(
        None, "folder of the run, out/runs/…; without it the newest in out_dir", positional=True
    )
    out_dir: Path = flag(OUT_DIR, "folder of the weight files and of runs/")
    output: Path | None = flag(None, f"file to write; without it {REPORT} in the run's folder")

    def __post_init__(self) -> None:
        check_ending("--output", self.output, ".html")


def main(argv: Sequence[str] | None = None) -> int:
    """One HTML page about a training run: curves, samples, cost, data, settings, environment.

    A finished run has written its own; this makes it anew, and makes one of a run that is still at work.

        minimind report                                    of the newest run in out/
        minimind report out/runs/pretrain_512
    """
    options = parse_flags(ReportOptions, argv, inspect.getdoc(main))
    folder = options.run_dir or newest_run(options.out_dir)
    path = write_run_report(folder, options.output)
    print(f"report: {path}  (open it in a browser)")
    return 0


def newest_run(out_dir: Path) -> Path:
    """Raises: UserError when there is none."""
    logs = [path for path in out_dir.glob(f"**/runs/*/{LOG}") if path.is_file()]
    if not logs:
        raise UserError(f"{out_dir} has no run; name its folder, or train one: minimind train pretrain")
    return max(logs, key=lambda path: path.stat().st_mtime).parent


def write_run_report(folder: Path, path: Path | None = None) -> Path:
    """Write the page of the run in `folder`, and return where it is.

    Raises: UserError when the folder holds no run, or the page cannot be written.
    """
    path = path or folder / REPORT
    log = folder / LOG
    if not log.is_file():
        hint = "" if folder.is_dir() else "; there is no such folder"
        where = "runs are in out/runs/, those of adapters in out/lora/runs/"
        raise UserError(f"{folder} holds no training run (no {LOG}){hint}; {where}")
    run = read_run(folder / RUN)
    columns = read_log(log)
    done = int(max(columns.get("loss", ([0], []))[0], default=0))
    total = run.get("total_steps")
    state = f"{done:,} / {total:,} 步 steps" if isinstance(total, int) else f"{done:,} 步 steps"
    if "cost" not in run:
        state += "，未完成 · not finished"
    write_report(
        path,
        title=f"MiniMind · {folder.name}",
        lead=state,
        runs=[(folder.name, log)],
        figures=figures(run, columns),
        samples=read_samples(folder / SAMPLES, run.get("run_id")),
        tables={
            "用量 · What it took": cost(run),
            "数据 · Data": data(run),
            "模型 · Model": model(run),
            "训练参数 · Flags": flags(run),
            "环境 · Environment": environment(run),
        },
    )
    return path


def read_run(path: Path) -> dict[str, Any]:
    """The settings of a run. Raises: UserError when they are damaged; a folder without has none."""
    try:
        run = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        run = None
    if not isinstance(run, dict):
        raise UserError(f"{path} is damaged; move it away to make a report without it")
    return run


def read_samples(path: Path, run_id: object) -> list[tuple[str, str]]:
    """Prompts and answers of this run, not of one before it; lines that are none are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    samples = []
    for line in lines:
        try:
            sample = json.loads(line)
            if sample["run_id"] == run_id:
                samples.append((str(sample["prompt"]), str(sample["answer"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return samples


# What the page shows of a run


def figures(run: Mapping[str, Any], columns: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, str]:
    shown = {}
    for name, key, form in (
        ("留出集每字节比特数 bits per byte", "eval_bpb", "{:.4f}"),
        ("留出集损失 held-out loss", "eval_loss", "{:.4f}"),
        ("训练损失 training loss", "loss", "{:.4f}"),
        ("偏好判断 pairs as preferred", "eval_accuracy", "{:.1%}"),
    ):
        if key in columns:
            shown[name] = form.format(columns[key][1][-1])
    if "tokens" in columns:
        shown["训练 token 数 tokens"] = f"{sum(columns['tokens'][1]):,.0f}"
    if "tokens_per_s" in columns:
        speeds = sorted(columns["tokens_per_s"][1])
        shown["每秒 token 数（中位）tokens/s"] = f"{speeds[len(speeds) // 2]:,.0f}"
    return shown


def part(run: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = run.get(key)
    return found if isinstance(found, dict) else {}


def named(run: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, object]:
    """The values of `run` under their names on the page, those that are there."""
    return {name: run[key] for key, name in names.items() if run.get(key) is not None}


def cost(run: Mapping[str, Any]) -> dict[str, object]:
    spent = part(run, "cost")
    shown: dict[str, object] = {}
    if isinstance(seconds := spent.get("seconds"), int | float):
        shown["用时 time"] = f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.2f} h"
    if isinstance(tokens := spent.get("tokens"), int):
        shown["token 数 tokens"] = f"{tokens:,}"
    if isinstance(rate := spent.get("tokens_per_s"), int | float):
        shown["平均速度 tokens/s, all in all"] = f"{rate:,.0f}"
    if isinstance(memory := spent.get("peak_memory"), int | float):
        shown["内存峰值 peak memory"] = f"{memory / 1e9:.2f} GB"
    if isinstance(money := spent.get("money"), int | float):
        shown["费用 money"] = f"¥{money:.2f}（¥{spent.get('price_per_hour')} / h）"
    return shown | named(spent, {"device": "设备 device"})


def data(run: Mapping[str, Any]) -> dict[str, object]:
    shown = named(
        part(run, "options"), {"data_path": "训练数据 training data", "eval_path": "留出数据 held-out data"}
    )
    for key, name in (
        ("data_documents", "记录数 records"),
        ("data_tokens", "一轮的 token 数 tokens an epoch"),
    ):
        if isinstance(count := run.get(key), int):
            shown[name] = f"{count:,}"
    return shown | named(
        run,
        {
            "data_sha256": "训练数据的 SHA-256 of the training data",
            "tokenizer_fingerprint": "分词器指纹 tokenizer fingerprint",
        },
    )


def model(run: Mapping[str, Any]) -> dict[str, object]:
    shown = named(run, {"stage": "阶段 stage", "started_from": "起点 started from", "run_id": "编号 run id"})
    for key, name in (("parameters", "参数量 parameters"), ("trainable_parameters", "训练的参数 trained")):
        if isinstance(count := run.get(key), int):
            shown[name] = f"{count:,}"
    return shown | part(run, "model")


def flags(run: Mapping[str, Any]) -> dict[str, object]:
    """Those that were given a value."""
    return {
        f"--{name}": " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in part(run, "options").items()
        if value is not None and name != "local_rank"
    }


def environment(run: Mapping[str, Any]) -> dict[str, object]:
    names = {"device": "设备 device", "dtype": "精度 dtype", "world_size": "进程数 processes"}
    shown = named(run, names) | part(run, "environment")
    return shown if "environment" in run else shown | named(run, {"torch": "PyTorch"})
