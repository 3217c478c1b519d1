"""The figures of the results, each drawn from what their JSON says and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.comparisons import (
    OURS,
    RECIPE,
    Comparison,
    curves_of,
    generation,
    preparation,
    stages,
    training,
)
from benchmarks.figures import Bar, Curve, Group, Line, Panel, draw, draw_bars, draw_curves

Result = dict[str, Any]
SHORT = {"datasets.map, tokenizers' threads": "datasets.map, threads"}


def draw_growth(path: Path, growth: Result) -> None:
    panels = []
    for axis in growth["axes"]:
        points = [point for point in axis["points"] if point["fitted"]]
        time = Line(axis["seconds_label"], [point["seconds"] for point in points])
        memory = Line("peak memory, MB", [point["peak_mb"] for point in points])
        panels.append(Panel(axis["title"], axis["x_label"], [point["x"] for point in points], time, memory))
    draw(path, panels, columns=2)


def draw_memory(path: Path, prepare_memory: Result) -> None:
    sizes = prepare_memory["sizes"]
    panels = [
        Panel(
            title,
            "size of the file, MB",
            [size["file_mb"] for size in sizes],
            Line("peak memory, MB", [size[f"{part}_peak_mb"] for size in sizes]),
            Line("seconds", [size[f"{part}_s"] for size in sizes]),
        )
        for title, part in (("Tokenising", "prepare"), ("Packing", "pack"))
    ]
    draw(path, panels, columns=2)


def draw_quality(path: Path, time_to_quality: Result) -> None:
    panels = {
        preset: [
            Curve(name, [p.seconds / 60 for p in curve], [p.bits_per_byte for p in curve], name == OURS)
            for name, curve in pair.items()
        ]
        for preset, pair in curves_of(time_to_quality).items()
    }
    levels = {preset: pair[RECIPE][-1].bits_per_byte for preset, pair in curves_of(time_to_quality).items()}
    draw_curves(path, panels, levels, ("minutes of training", "bits per byte, held out"))


def draw_speeds(
    path: Path,
    train_speed: Result | None,
    stage_peers: Result | None,
    generation_speed: Result | None,
    prepare_speed: Result | None,
) -> None:
    """A group of bars for each comparison, as far as it was measured."""
    groups = []
    if train_speed:
        groups += [group(c, f"Training: {c.work}") for c in training(train_speed["settings"])]
    if stage_peers:
        found = stages(stage_peers["stages"])
        groups += [group(found[s], f"{found[s].work} beside TRL") for s in ("sft", "dpo") if s in found]
    if generation_speed:
        compared = generation(generation_speed["tokens_per_s"]).values()
        groups += [group(c, f"Generation: {c.work}") for c in compared]
    if prepare_speed:
        rates = {name: r for name, r in prepare_speed["mb_per_s"].items() if "alone" not in name}
        groups.append(group(preparation(rates, prepare_speed["goal"]), "JSONL to packed rows"))
    draw_bars(
        path, groups, "times as fast as the peer at 1×: median round,\nand a line from slowest to fastest"
    )


def group(comparison: Comparison, title: str) -> Group:
    """Ours first, then the others; the fastest first."""

    def place(rival: str) -> tuple[bool, float]:
        return not rival.startswith(OURS), -comparison.times(rival).median

    bars = [
        Bar(
            SHORT.get(rival, rival).replace(OURS, "MiniMind"),
            *comparison.times(rival),
            rival.startswith(OURS),
        )
        for rival in sorted(comparison.rates, key=place)
    ]
    return Group(title, bars, comparison.goal)


# Files in benchmarks/results: how to draw them, and from which results there.
PICTURES = {
    "speed.svg": (draw_speeds, ("train_speed", "stage_peers", "generation_speed", "prepare_speed")),
    "growth.svg": (draw_growth, ("growth",)),
    "prepare_memory.svg": (draw_memory, ("prepare_memory",)),
    "time_to_quality.svg": (draw_quality, ("time_to_quality",)),
}
