"""One HTML page about a training: results against their goals, loss curves, a chat, machine and cost.

The page is a single file that asks nothing of the network. The curves are SVG drawn in the page's own text
colour, so they follow its light or dark look.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import msgspec


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
        return f"{self.value:.1f} %" if self.unit == "%" else f"{self.value:.4g}{self.unit}"

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
    metrics: Sequence[Metric],
    samples: Sequence[tuple[str, str]],
    environment: Mapping[str, object],
    cost: Mapping[str, object],
) -> None:
    """Write the page to `path`.

    Args:
        runs: the name of each training stage and its `metrics.jsonl`. Lines with `loss` are training steps,
            lines with `eval_bpb` are measurements on held-out text.
        samples: questions and answers, shown as a chat.
        environment, cost: shown as tables, in their order.
    """
    sections = [
        ("Results", _results(metrics)),
        ("A conversation", _chat(samples)),
        ("Learning curves", "".join(_curves(name, log) for name, log in runs)),
        ("Questions and answers", _examples(metrics)),
        ("What it took", _facts(cost)),
        ("Environment", _facts(environment)),
    ]
    body = "".join(
        f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections if content
    )
    met = sum(metric.passed for metric in metrics)
    lead = f'<p class="lead">{met} of {len(metrics)} goals met</p>' if metrics else ""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body><main><h1>{escape(title)}</h1>{lead}{body}</main></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


# Sections


def _results(metrics: Sequence[Metric]) -> str:
    return _table(
        ("", "Result", "Goal", ""),
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
            ("Question", "Answer", "Expected", "Score"),
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
    return _table((), ((escape(name), escape(str(value))) for name, value in facts.items()), "facts")


def _curves(name: str, log: Path) -> str:
    lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines() if line.strip()]
    steps = [line for line in lines if "loss" in line]
    measured = [line for line in lines if "eval_bpb" in line]
    charts = [
        _chart(f"{name}: {label}", label, [line["step"] for line in series], [line[key] for line in series])
        for label, key, series in (
            ("training loss", "loss", steps),
            ("held-out bits per byte", "eval_bpb", measured),
        )
        if series
    ]
    return f'<h3>{escape(name)}</h3><div class="charts">{"".join(charts)}</div>'


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    """A table of cells that are already HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def _mark(passed: bool) -> str:
    return '<span class="pass">✓ met</span>' if passed else '<span class="miss">✗ missed</span>'


# Curves

TEXT_COLOUR, LINE_COLOUR = "#010203", "#040506"  # stand-ins in the SVG for what the page's CSS decides


def _chart(alt: str, label: str, steps: list[int], values: list[float]) -> str:
    """A line over the steps as inline SVG; a noisy series also gets its moving average."""
    import matplotlib

    matplotlib.use("Agg")  # before pyplot, which would look for a screen
    import matplotlib.pyplot as plt

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = {"font.size": 9, "svg.hashsalt": alt}  # the salt keeps the ids of two charts apart
    with plt.rc_context(settings | dict.fromkeys(coloured, TEXT_COLOUR)):
        figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        if len(values) < 40:
            axes.plot(steps, values, "o-", color=LINE_COLOUR, linewidth=1, markersize=3.5)
        else:
            axes.plot(steps, values, color=LINE_COLOUR, linewidth=1, alpha=0.3)
            axes.plot(steps, _moving_average(values), color=LINE_COLOUR, linewidth=1.8)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.15, color=TEXT_COLOUR)
        axes.spines[["top", "right"]].set_visible(False)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
    drawing = drawing[drawing.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1
    )
    return drawing.replace(TEXT_COLOUR, "currentColor").replace(LINE_COLOUR, "var(--accent)")


def _moving_average(values: list[float]) -> list[float]:
    """Exponential average over about a fortieth of the series."""
    weight, average, smooth = 40 / len(values), values[0], []
    for value in values:
        average += weight * (value - average)
        smooth.append(average)
    return smooth


CSS = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #1c2330; --quiet: #667085;
  --line: #e3e7ee; --accent: #2f6fed; --pass: #12805c; --miss: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151c; --card: #1a202a; --text: #e6e9ef;
  --quiet: #98a2b3; --line: #2b3341; --accent: #7aa7ff; --pass: #4fd1a1; --miss: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; }
h2 { margin: 0 0 .9rem; font-size: 1.15rem; }
h3 { margin: 1rem 0 .3rem; font-size: .95rem; color: var(--quiet); font-weight: 600; }
.lead { margin: .3rem 0 0; color: var(--quiet); font-size: 1.05rem; }
section { margin-top: 1.25rem; padding: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; }
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
.charts svg { width: 100%; height: auto; max-width: 34rem; }
details { padding: .5rem 0; border-bottom: 1px solid var(--line); }
details:last-child { border-bottom: 0; }
summary { cursor: pointer; }
"""
