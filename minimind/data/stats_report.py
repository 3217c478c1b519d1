"""The figures of `stats` for people: lines in the terminal, and a picture of the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minimind.data.found import Found
from minimind.files import atomic_write, shown_size

if TYPE_CHECKING:
    from minimind.data.stats import Packed, Stats

BAR = 40  # characters of the longest bar
BINS_PER_DOUBLING = 4  # of the picture


def show(stats: Stats) -> None:
    """Print `stats`."""
    languages = ", ".join(f"{share:.1%} {name.capitalize()}" for name, share in stats.languages.items())
    mostly = ", ".join(f"{name.capitalize()} {n:,}" for name, n in stats.language_of_records.items() if n)
    lengths = stats.lengths
    facts = {
        "bad records": found(stats.bad_records),
        "text": f"{shown_size(stats.bytes)}, {stats.characters:,} characters",
        "letters": f"{languages}; records mostly in {mostly}",
        "tokens": f"{stats.tokens:,}, of them {stats.target_tokens:,} to be learnt; "
        f"{stats.characters / stats.tokens:.2f} characters each",
        "turns": turns(stats.turns),
        "copies": f"{found(stats.copies)}; nearly copies: {found(stats.near_copies)}",
        **{f"rows of {packed.max_seq_len:,}": fate(packed, stats) for packed in stats.packed},
        "lengths": f"mean {lengths.mean:,.1f}, median {lengths.median:,.0f}, 90% up to {lengths.p90:,.0f}, "
        f"99% up to {lengths.p99:,.0f}, longest {lengths.max:,} tokens",
    }
    print(f"{stats.file}: {stats.records:,} records of kind {stats.kind}")
    for name, fact in facts.items():
        if fact:
            print(f"{name:<14}{fact}")
    for line in histogram(lengths.histogram):
        print(line)


def found(records: Found) -> str:
    """How many, and on which lines."""
    return f"{records.count:,} ({records.where})" if records.count else "none"


def turns(counts: dict[int, int]) -> str:
    """Conversations by the number of their questions: 1, 2–3, 4–7, …"""
    doublings: Counter[int] = Counter()
    for questions, count in counts.items():
        doublings[1 << questions.bit_length() - 1] += count
    return ", ".join(f"{n}{f'–{2 * n - 1}' * (n > 1)}: {count:,}" for n, count in sorted(doublings.items()))


def fate(packed: Packed, stats: Stats) -> str:
    """What becomes of the records in rows of this length."""
    parts = [f"{packed.rows:,}, {packed.padding:.1%} padding"]
    if packed.split:
        parts.append(f"{packed.split:,} records split, nothing lost")
    if packed.cut or packed.dropped:
        what, of = ("answer ", stats.target_tokens) if stats.kind != "preference" else ("", stats.tokens)
        lost = f"{packed.cut_tokens:,} {what}tokens lost ({packed.cut_tokens / of:.1%})"
        parts.append(f"records cut: {packed.cut:,}, left out: {packed.dropped:,}; {lost}")
    return "; ".join(parts)


def histogram(counts: dict[int, int]) -> list[str]:
    """A bar for every doubling of the length, from the shortest to the longest."""
    most, total = max(counts.values()), sum(counts.values())
    lines, start = [], min(counts)
    while start <= max(counts):
        count = counts.get(start, 0)
        bar = "█" * round(BAR * count / most) or "▏" * (count > 0)
        lines.append(f"{start:>8,} – {2 * start - 1:<8,} {bar:<{BAR}} {count:>9,} {count / total:>6.1%}")
        start *= 2
    return lines


def draw(path: Path, lengths: np.ndarray, max_seq_lens: Sequence[int]) -> None:
    """Write a PNG of how many records have which length in tokens."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    first, last = np.floor(np.log2(lengths.min())), np.log2(lengths.max())
    bins = 2 ** np.arange(first, last + 1 / BINS_PER_DOUBLING, 1 / BINS_PER_DOUBLING)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=bins.tolist(), color="tab:blue", edgecolor="white", linewidth=0.3)
    for i, length in enumerate(max_seq_lens):
        label = f"{length:,}: {(lengths > length).mean():.1%} are longer"
        axes.axvline(length, color=f"C{i + 1}", linestyle="--", linewidth=1.2, label=label)
    axes.legend(fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set(xlabel="tokens of a record", ylabel="records", title=f"{len(lengths):,} records")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
