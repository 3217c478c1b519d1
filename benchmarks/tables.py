"""What the READMEs and the documentation show of each result, in Chinese and in English, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from textwrap import shorten
from typing import Any, NamedTuple

from benchmarks.comparisons import (
    OURS,
    RECIPE,
    Comparison,
    Race,
    curves_of,
    generation,
    median_and_spread,
    preparation,
    races,
    stages,
    training,
)

Result = dict[str, Any]
Pick = Callable[[str, str], str]  # of the same in Chinese and in English, what the page's language has


class Block(NamedTuple):
    """A part of a page that is written by machine."""

    result: str  # the file in benchmarks/results, without its suffix
    markdown: Callable[[Result, Pick], str]


RIVALS = {
    OURS: ("MiniMind", "MiniMind"),
    RECIPE: (
        "原版做法：transformers、fp32、逐条填充、AdamW",
        "the original's recipe: transformers, fp32, padded records, AdamW",
    ),
    "litgpt": ("litgpt（打包，bf16）", "litgpt (packed, bf16)"),
    "TRL": ("TRL", "TRL as it comes"),
    "TRL, packing": ("TRL，打包", "TRL, packing"),
    "TRL, references before": ("TRL，先算参考模型", "TRL, references computed before"),
    "LoRA": ("LoRA，MiniMind", "LoRA, MiniMind"),
    "full fine-tuning": ("全量微调，MiniMind", "full fine-tuning, MiniMind"),
    "minimind half": ("MiniMind，半精度", "MiniMind, half precision"),
    "minimind int8": ("MiniMind，int8", "MiniMind, int8"),
    "datasets.map, transformers": ("`datasets.map`，经 transformers", "`datasets.map` by transformers"),
    "datasets.map, tokenizers": ("`datasets.map`，直接用 `tokenizers`", "`datasets.map` with `tokenizers`"),
    "datasets.map, tokenizers' threads": (
        "`datasets.map`，`tokenizers` 自己的线程",
        "`datasets.map`, `tokenizers`' own threads",
    ),
    "tokenizers alone, texts in memory": (
        "只有 `tokenizers`，文本在内存里",
        "`tokenizers` alone, texts in memory",
    ),
}


def training_speed(result: Result, pick: Pick) -> str:
    waiting = max(setting["waiting_for_data"] for setting in result["settings"])
    shares = sorted(setting["of_matmul_rate"] for setting in result["settings"])
    least, most, waited = f"{shares[0]:.0%}", f"{shares[-1]:.0%}", f"{waiting:.1%}"
    compared = ((f"`{c.work.replace(', ', '`, `')}`", c, None) for c in training(result["settings"]))
    return (
        comparison_table(compared, pick("有效 token/s", "useful tokens/s"), pick)
        + "\n\n"
        + pick(
            f"MiniMind 用到同时测得的 bf16 矩阵乘速度的 {least} 到 {most}，"
            f"等数据的时间最多占一步的 {waited}。",
            f"MiniMind uses {least} to {most} of the rate of bf16 matrix products meanwhile. Waiting for "
            f"data takes {waited} of a step at most.",
        )
    )


def stage_peers(result: Result, pick: Pick) -> str:
    names = {"sft": "SFT", "dpo": "DPO", "lora": "LoRA"}
    rivals = {stage: found["rivals"] for stage, found in result["stages"].items()}
    compared = (
        (names[stage], c, {name: f"{shown['peak_gb']:.1f} GB" for name, shown in rivals[stage].items()})
        for stage, c in stages(result["stages"]).items()
    )
    speed, memory = pick("有效 token/s", "useful tokens/s"), pick("峰值内存", "peak memory")
    return comparison_table(compared, speed, pick, memory)


def generation_speed(result: Result, pick: Pick) -> str:
    compared = (
        (pick(f"{rows} 个回答", c.work), c, None) for rows, c in generation(result["tokens_per_s"]).items()
    )
    return comparison_table(compared, "token/s", pick)


def mixture(result: Result, pick: Pick) -> str:
    def share(rival: str, of: str) -> str:
        return f"{statistics.median(result['rivals'][rival][f'{of}_of_dense']):.0%}"

    whole, masks = (share(rival, "tokens_per_s") for rival in ("moe", "moe, loop with masks"))
    passes = share("moe", "tokens_per_cpu_s_of_passes")
    return pick(
        f"混合专家的训练速度是同等计算量稠密模型的 {whole}（不算优化器 {passes}），"
        f"常见的逐专家掩码循环只有 {masks}。",
        f"The mixture of experts trains at {whole} of the tokens/s of a dense model of as much work "
        f"({passes} without the optimizer), the usual loop with a mask for each expert at {masks}.",
    )


def startup(result: Result, pick: Pick) -> str:
    preset, step = result["options"]["preset"], statistics.median(result["first_step_s"])
    slowest = max(result["help_s"].values())
    return pick(
        f"缓存是热的时候，敲下命令 {step:.1f} 秒后 `{preset}` 的第一步就完成；"
        f"最慢的 `--help` 在 {slowest:.2f} 秒内回答。",
        f"The first step of `{preset}` is done {step:.1f} s after the command, with warm caches; the slowest "
        f"`--help` answers in {slowest:.2f} s.",
    )


def quality(result: Result, pick: Pick) -> str:
    head = pick(
        "|原版做法的留出集比特每字节|用时|MiniMind 达到它用时|占比|之后到",
        "|the recipe's bits per byte, held out|its time|MiniMind had that after|share|and went on to",
    )
    rows = (quality_row(preset, race, pick) for preset, race in races(curves_of(result)))
    return table(head.split("|"), rows)


def quality_row(preset: str, race: Race, pick: Pick) -> list[str]:
    second, never = pick("秒", "s"), pick("没有达到", "not reached")
    value, after = f"{race.last.bits_per_byte:.3f}", f"{race.last.seconds:,.0f}"
    return [
        f"`{preset}`",
        f"{race.goal:.3f}",
        f"{race.recipe_seconds:,.0f} {second}",
        f"{race.seconds:,.0f} {second}" if race.seconds else never,
        f"{race.share:.0%}" if race.share else "",
        pick(f"{after} 秒时 {value}", f"{value} after {after} s"),
    ]


def gpu(result: Result, pick: Pick) -> str:
    peaks = result["peak_flops"]
    rate, sheet = (f"{peaks[of] / 1e12:,.0f}" if peaks[of] else "?" for of in ("measured", "data_sheet"))
    head = pick(
        f"预训练|有效 token/s|占实测 bf16 速率（{rate} TFLOP/s）|占标称速率（{sheet}）|峰值显存",
        f"pretraining|useful tokens/s|of the measured bf16 rate ({rate} TFLOP/s)"
        f"|of the data sheet's ({sheet})|peak memory",
    )
    wide = pick("与 `moe` 计算量相同的稠密模型", "dense model of as much work as `moe`")
    rows, rates = [], {}
    for row in result["speed"]:
        if row["stage"] == "pretrain" and "error" not in row:
            name = wide if row["preset"] == "wide" else f"`{row['preset']}`"
            rates[row["preset"]] = row["tokens_per_s"]
            shares = [f"{row[f'mfu_{of}']:.0%}" if row[f"mfu_{of}"] else "?" for of in peaks]
            rows.append([name, f"{round(row['tokens_per_s'], -3):,.0f}", *shares, f"{row['peak_gb']:.1f} GB"])
    stages = stages_on_gpu(result, pick)
    parts = (table(head.split("|"), rows), epochs(result, rates, pick), stages, whole_run(result, pick))
    return "\n\n".join(part for part in parts if part)


def stages_on_gpu(result: Result, pick: Pick) -> str:
    """What comes after pretraining, with passes of the default size."""
    head = pick(
        "`small` 之后的阶段|每次的行数 × 长度|每步|有效 token/s|峰值显存",
        "`small` in later stages|rows a pass × length|step|useful tokens/s|peak memory",
    )
    rows = [
        [
            f"`{row['stage']}`",
            f"{row['rows_at_once']} × {row['rows'][1]:,}",
            f"{row['step_s'] * 1000:.1f} ms",
            f"{round(row['tokens_per_s'], -3):,.0f}",
            f"{row['peak_gb']:.1f} GB",
        ]
        for row in result["speed"]
        if row["stage"] != "pretrain" and "error" not in row
    ]
    return table(head.split("|"), rows) if rows else ""


def epochs(result: Result, rates: dict[str, float], pick: Pick) -> str:
    """How long an epoch of pretrain_hq takes at the measured rates."""
    tokens = (result["epoch_hours"]["extrapolated"] or 0) * 3600 * rates.get("small", 0)
    minutes = {name: tokens / rates[name] / 60 for name in ("small", "base") if name in rates and tokens}
    shown = [
        pick(f"`{name}` {took:.1f} 分钟", f"`{name}` {took:.1f} minutes") for name, took in minutes.items()
    ]
    if not shown:
        return ""
    return pick(
        f"按这个速度，整个 `pretrain_hq` 的 {tokens / 1e8:.1f} 亿 token：{'，'.join(shown)}。",
        f"At that rate the {tokens / 1e6:,.0f} M tokens of the whole `pretrain_hq` take {', '.join(shown)}.",
    )


def whole_run(result: Result, pick: Pick) -> str:
    """Of the one job that evaluates and saves, and of the checks: what came of them, or what went wrong."""
    run, checks = result["stretch"], result["checks"]
    if error := run.get("error"):
        ended = pick(
            f"没成的：带评估和检查点的一次运行（{error}）。",
            f"A run with evaluation and checkpoints failed: {error}.",
        )
    else:
        steps, seconds, rest = f"{run['steps']:,}", f"{run['run_s']:.0f}", f"{run['rest_s']:.0f}"
        minutes = f"{result['epoch_hours']['from_the_stretch'] * 60:.1f}"
        ended = pick(
            f"`small` 完整的一次运行，{steps} 步用了 {seconds} 秒，其中启动、编译、评估、保存和报告共 "
            f"{rest} 秒；照此整个 epoch 是 {minutes} 分钟。",
            f"A whole run of `small`, {steps} steps, took {seconds} s, {rest} of them for start, compiling, "
            f"evaluations, saving and report; so an epoch takes {minutes} minutes.",
        )
    passed, failed = sum(check["passed"] for check in checks), ""
    wrong = [
        f"{' '.join(dict.fromkeys((c['model'], c['check'])))}: "
        + (shorten(c["error"], 45, placeholder=" …") if "error" in c else format(c["value"], ".2g"))
        for c in checks
        if not c["passed"]
    ]
    if wrong:
        failed = pick(f"（没过：{'；'.join(wrong)}）", f" (not: {'; '.join(wrong)})")
    return ended + pick(
        f"与 CPU 核对，{len(checks)} 项中通过 {passed} 项{failed}。",
        f" Of {len(checks)} checks against the CPU {passed} passed{failed}.",
    )


def data(result: Result, pick: Pick) -> str:
    compared = [(f"`{result['data']}`", preparation(result["mb_per_s"], result["goal"]), None)]
    return comparison_table(compared, pick("MB/s 文本", "MB/s of text"), pick, digits=1)


def data_memory(result: Result, pick: Pick) -> str:
    rows = (
        [
            f"{size['file_mb']:,.0f} MB",
            f"{size['mb_per_s']:.1f}",
            *(f"{size[name]:,.0f} MB" for name in ("prepare_peak_mb", "pack_peak_mb")),
            f"{size['pack_s']:.1f} " + pick("秒", "s"),
        ]
        for size in result["sizes"]
    )
    head = pick(
        "文件|MB/s 文本|切词时的内存|打包时的内存|打包用时",
        "file|MB/s of text|memory while tokenising|while packing|packing takes",
    )
    return table(head.split("|"), rows)


def growth(result: Result, pick: Pick) -> str:
    titles = {
        "Length of a row": ("行的长度，每 token 时间", "length of a row, time per token"),
        "Size of the model": ("模型大小，每 token 时间", "size of the model, time per token"),
        "Size of the data file": ("数据文件大小", "size of the data file"),
        "Number of processes that share the cores": ("共用这些核的进程数", "processes that share the cores"),
    }
    rows = []
    for axis in result["axes"]:
        fits = (axis["exponents"][value] for value in ("seconds", "peak_mb"))
        shown = (f"{fit['all']:z.2f} ({fit['last_two']:z.2f})" for fit in fits)
        names = [point["name"] for point in axis["points"] if point["fitted"]]
        rows.append(
            [
                pick(*titles[axis["title"]]),
                f"{names[0]} … {names[-1]}",
                *(cell.replace("-", "−") for cell in shown),
            ]
        )
    head = pick("随什么增长|从 … 到|时间|内存", "grows with|from … to|time|memory")
    return table(head.split("|"), rows)


def serving(result: Result, pick: Pick) -> str:
    options, found = result["options"], []
    for name, zh, en in (
        ("alone", "1 路", "one stream"),
        ("together", f"{options['streams']} 路", f"{options['streams']} streams"),
    ):
        speed, first = result[name]["tokens_per_s"], result[name]["first_token_s"].values()
        found.append([pick(zh, en), f"{speed:,.0f}", *(pick(f"{s:.2f} 秒", f"{s:.2f} s") for s in first)])
    head = f"`{options['preset']}`" + pick(
        "|token/s|首 token：中位数|95 %|99 %", "|tokens/s|first token: median|95 %|99 %"
    )
    asked, load = f"{options['requests']:,}", f"{result['load_average_before']:.0f}"
    same, rounded, wrong, lost = (f"{result[name]:,}" for name in ("same", "rounded", "wrong", "lost"))
    return (
        pick(
            f"{asked} 个回答：{same} 个相同，{rounded} 个只因舍入不同，{wrong} 个错误，{lost} 个丢失。"
            f"开始前机器的平均负载：{load}（别的程序也在用时，速度只是下限）。",
            f"Of {asked} answers {same} the same, {rounded} other by rounding, {wrong} wrong, {lost} lost. "
            f"Load average of the machine before: {load} (where others use it, speeds are a lower bound).",
        )
        + "\n\n"
        + table(head.split("|"), found)
    )


BLOCKS = {
    "training": Block("train_speed", training_speed),
    "stages": Block("stage_peers", stage_peers),
    "generation": Block("generation_speed", generation_speed),
    "mixture": Block("moe_speed", mixture),
    "startup": Block("startup", startup),
    "quality": Block("time_to_quality", quality),
    "gpu": Block("gpu", gpu),
    "data": Block("prepare_speed", data),
    "memory": Block("prepare_memory", data_memory),
    "growth": Block("growth", growth),
    "serving": Block("serve_load", serving),
}


# ---- Parts of blocks ----


def comparison_table(
    compared: Iterable[tuple[str, Comparison, dict[str, str] | None]],
    speed: str,
    pick: Pick,
    last: str | None = None,
    digits: int = 0,
) -> str:
    """Rivals below each other: medians with the least and the most of the rounds, and times the peer."""

    def rows() -> Iterator[list[str]]:
        for work, comparison, more in compared:
            rivals = sorted(comparison.rates, key=lambda rival: comparison.times(rival))
            for number, rival in enumerate(rivals):
                yield [
                    work if number == 0 else "",
                    pick(*RIVALS.get(rival, (rival, rival))),
                    median_and_spread(comparison.rates[rival], digits),
                    f"{comparison.times(rival).median:.2f} ×",
                    *([more[rival]] if more else []),
                ]

    return table(["", "", speed, "", *([last] if last else [])], rows())


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def origin(result: Result, pick: Pick) -> str:
    """How it was measured: command and machine."""
    machine = result["machine"]
    cores = pick(f"{machine['cores']} 核", f"{machine['cores']} cores")
    more = [machine[name] for name in ("bf16", "GPU") if name in machine]
    where = ", ".join([machine["processor"], cores, *more, f"PyTorch {machine['PyTorch']}"])
    return f"`{result['command'].strip()}` · {where}"
