"""One HTML page about a training: results, curves, samples, cost, environment, in Chinese and English.

The page is a single file that asks nothing of the network and runs no script. It has the look, light or dark,
that the reader's system has. `minimind report` writes one of a run (`run_report.py`), `make demo` one of its
stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from minimind.evaluate.charts import Series, chart
from minimind.files import atomic_write

SHOWN_AT_ONCE = 10  # rows of a table; longer ones are folded away


class Example(NamedTuple):
    """One question a model was measured with, and how it did."""

    question: str
    answer: str
    expected: str
    score: float  # 0 to 1


class Metric(NamedTuple):
    """One measured value and its goal, both in `unit` ("%" or "")."""

    name: str
    value: float
    goal: float
    unit: str
    examples: Sequence[Example] = ()
    lower_is_better: bool = False

    @property
    def passed(self) -> bool:
        return self.value <= self.goal if self.lower_is_better else self.value >= self.goal

    @property
    def shown_value(self) -> str:
        if self.unit == "%":
            return f"{self.value:.1f} %"
        return f"{self.value:.4g}{self.unit}" if self.unit else f"{self.value:.3f}"

    @property
    def shown_goal(self) -> str:
        return (
            f"{'≤' if self.lower_is_better else '≥'} {self.goal:.4g}{' %' if self.unit == '%' else self.unit}"
        )


def write_report(
    path: Path,
    *,
    title: str,
    runs: Sequence[tuple[str, Path]],
    tables: Mapping[str, Mapping[str, object]],
    lead: str = "",
    figures: Mapping[str, str] | None = None,
    metrics: Sequence[Metric] = (),
    samples: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page to `path`. Parts that have nothing in them are left out.

    Args:
        runs: the name of each training stage and its `metrics.jsonl`, as `minimind.train.monitor` writes it.
        tables: further parts by their heading, each a table of names and values, in this order.
        lead: a line below the title; without it, how many of the metrics' goals are met.
        figures: a few numbers by name, shown large.
        metrics: what was measured on questions.
        samples: questions and answers, shown as a chat.
    Raises: UserError when the file cannot be written.
    """
    sections = [
        ("", _figures(figures or {})),
        ("结果 · Results", _results(metrics)),
        ("学习曲线 · Learning curves", "".join(_curves(name, log, len(runs) == 1) for name, log in runs)),
        ("对话样例 · Samples", _chat(samples)),
        ("题目与回答 · Questions and answers", _examples(metrics)),
        *((escape(heading), _facts(facts)) for heading, facts in tables.items() if facts),
    ]
    body = "".join(
        f"<section>{f'<h2>{heading}</h2>' if heading else ''}{content}</section>"
        for heading, content in sections
        if content
    )
    if metrics and not lead:
        lead = f"{sum(metric.passed for metric in metrics)} of {len(metrics)} goals met"
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    page = (
        f'<!doctype html><html lang="zh"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><main><h1>{escape(title)}</h1>"
        f"{lead}{body}</main></body></html>\n"
    )
    atomic_write(path, lambda file: file.write(page.encode("utf-8", "replace")))


# Sections


def _figures(figures: Mapping[str, str]) -> str:
    cards = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures.items()
    )
    return f'<div class="figures">{"".join(cards)}</div>' if figures else ""


def _results(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return ""
    return _table(
        ("", "结果 Result", "目标 Goal", ""),
        (
            (
                escape(metric.name),
                f"<b>{escape(metric.shown_value)}</b>",
                escape(metric.shown_goal),
                _mark(metric.passed),
            )
            for metric in metrics
        ),
        "results",
    )


def _examples(metrics: Sequence[Metric]) -> str:
    return "".join(
        f"<details><summary>{escape(metric.name)}</summary>"
        + _table(
            ("问 Question", "答 Answer", "应为 Expected", "得分 Score"),
            (
                (escape(e.question), escape(e.answer), escape(e.expected), f"{e.score:.2f}")
                for e in metric.examples
            ),
        )
        + "</details>"
        for metric in metrics
        if metric.examples
    )


def _chat(samples: Sequence[tuple[str, str]]) -> str:
    turns = (
        f'<p class="user">{escape(question)}</p><p class="model">{escape(answer)}</p>'
        for question, answer in samples
    )
    return f'<div class="chat">{"".join(turns)}</div>' if samples else ""


def _facts(facts: Mapping[str, object]) -> str:
    table = _table((), ((escape(name), escape(str(value))) for name, value in facts.items()), "facts")
    if len(facts) <= SHOWN_AT_ONCE:
        return table
    return f"<details><summary>{len(facts)} 项 entries</summary>{table}</details>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    """A table of cells that are already HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def _mark(passed: bool) -> str:
    return '<span class="pass">✓ met</span>' if passed else '<span class="miss">✗ missed</span>'


# Curves

LEARNING = {
    "损失 · Loss": {"loss": "训练 training", "eval_loss": "留出集 held out"},
    "留出集每字节比特数 · Held-out bits per byte": {"eval_bpb": ""},
}
OTHERS = {
    "学习率 · Learning rate": {"lr": ""},
    "梯度范数 · Gradient norm": {"grad_norm": ""},
    "速度 · Tokens per second": {"tokens_per_s": ""},
    "回报 · Rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "各专家的份额 · Expert load": {f"expert_load/{i}": f"{i}" for i in range(4)},
}
TOO_LARGE = 1e30  # no number of a run; nor is NaN, which compares as false
NOT_DRAWN = {"step", "tokens", "mfu", "epoch", "skipped"}


def _curves(name: str, log: Path, alone: bool) -> str:
    """All that is in a log; of several runs, what is not about learning stays folded away."""
    columns = read_log(log)
    drawn = {key for keys in (LEARNING | OTHERS).values() for key in keys} | NOT_DRAWN
    rest = OTHERS | {key: {key: ""} for key in columns if key not in drawn}
    first, more = (
        "".join(
            f"<div>{chart(title, found)}</div>"
            for title, keys in charts.items()
            if (found := [Series(label, *columns[key]) for key, label in keys.items() if key in columns])
        )
        for charts in (LEARNING, rest)
    )
    heading = "" if alone else f"<h3>{escape(name)}</h3>"
    if alone:
        first, more = first + more, ""
    folded = f'<details><summary>更多 · more</summary><div class="charts">{more}</div></details>'
    return f'{heading}<div class="charts">{first}</div>{folded if more else ""}' if first else ""


def read_log(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """(steps, values) by the name of what was logged, from the lines of a `metrics.jsonl`.

    A run that is still at work, or was killed, may have left half a line, which is passed over.
    """
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for line in path.read_bytes().splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        for key, value in entry.items():
            if isinstance(value, int | float) and abs(value) < TOO_LARGE and abs(step) < TOO_LARGE:
                steps, values = columns.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return columns


CSS = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #1c2330; --quiet: #667085;
  --line: #e3e7ee; --accent: #2f6fed; --second: #d9642c; --third: #12805c; --fourth: #8a4fd3;
  --pass: #12805c; --miss: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151c; --card: #1a202a; --text: #e6e9ef;
  --quiet: #98a2b3; --line: #2b3341; --accent: #7aa7ff; --second: #ffa071; --third: #4fd1a1;
  --fourth: #c3a1ff; --pass: #4fd1a1; --miss: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .9rem; font-size: 1.15rem; }
h3 { margin: 1rem 0 .3rem; font-size: .95rem; color: var(--quiet); font-weight: 600; }
.lead { margin: .3rem 0 0; color: var(--quiet); font-size: 1.05rem; overflow-wrap: anywhere; }
section { margin-top: 1.25rem; padding: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures span { color: var(--quiet); font-size: .85rem; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; }
th { text-align: left; color: var(--quiet); font-weight: 500; font-size: .82rem; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.results td:not(:first-child) { white-space: nowrap; font-variant-numeric: tabular-nums; }
.facts td:first-child { width: 34%; color: var(--quiet); }
.pass, .miss { font-weight: 600; }
.pass { color: var(--pass); }
.miss { color: var(--miss); }
.chat { display: flex; flex-direction: column; gap: .5rem; }
.chat p { margin: 0; max-width: 82%; padding: .55rem .9rem; border-radius: 16px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.user { align-self: flex-end; color: #fff; background: #2f6fed; border-bottom-right-radius: 4px; }
.model { align-self: flex-start; background: var(--ground); border: 1px solid var(--line);
  border-bottom-left-radius: 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; display: block; }
.charts text { fill: var(--quiet); font-size: 11px; font-variant-numeric: tabular-nums; }
.charts .title { fill: var(--text); font-size: 13px; font-weight: 600; }
.charts .y { text-anchor: end; }
.charts .x { text-anchor: middle; }
.charts .grid { stroke: var(--line); }
.legend { margin: 0; text-align: center; font-size: .82rem; color: var(--quiet); }
details { padding: .5rem 0; border-bottom: 1px solid var(--line); }
details:last-child { border-bottom: 0; }
summary { cursor: pointer; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
