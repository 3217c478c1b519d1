"""What results say: medians of the rounds, how many times as fast as a named peer, who was first.

The tables that benchmarks print, those of the READMEs and the figure all have their numbers from here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

RECIPE = "original's recipe"
OURS = "minimind"


class Times(NamedTuple):
    """How many times the median of the peer: the median of the rounds, and their least and most."""

    median: float
    least: float
    most: float


class Comparison(NamedTuple):
    """Rivals that did the same work in turn."""

    work: str
    peer: str  # its median is 1
    rates: dict[str, list[float]]  # work in a second, of each round
    goal: float | None = None  # times the peer

    def times(self, rival: str) -> Times:
        one, rates = statistics.median(self.rates[self.peer]), self.rates[rival]
        return Times(statistics.median(rates) / one, min(rates) / one, max(rates) / one)


def training(settings: list[dict[str, Any]]) -> list[Comparison]:
    """Of `train_speed`, setting by setting."""
    return [Comparison(f"{s['data']}, {s['preset']}", RECIPE, s["tokens_per_s"]) for s in settings]


STAGE_PEERS = {"sft": "TRL", "dpo": "TRL", "lora": "full fine-tuning"}


def stages(results: dict[str, dict[str, Any]]) -> dict[str, Comparison]:
    """Of `stage_peers`, by stage; the peer is TRL's trainer as it comes."""
    return {
        stage: Comparison(
            stage.upper(),
            STAGE_PEERS[stage],
            {rival: shown["tokens_per_s"] for rival, shown in found["rivals"].items()},
        )
        for stage, found in results.items()
    }


def generation(speeds: dict[str, list[float]]) -> dict[int, Comparison]:
    """Of `generation_speed`, by answers at once; the peer is transformers in its faster precision."""
    by_rows: dict[int, dict[str, list[float]]] = {}
    for name, rates in speeds.items():
        rival, _, rows = name.rpartition(" × ")
        by_rows.setdefault(int(rows), {})[rival] = rates
    return {
        rows: Comparison(f"{rows} answer{'s at once' * (rows > 1)}", fastest(rates, "transformers"), rates)
        for rows, rates in by_rows.items()
    }


def preparation(rates: dict[str, list[float]], goal: float) -> Comparison:
    """Of `prepare_speed`; the peer is the fastest way with `datasets`."""
    return Comparison("data", fastest(rates, "datasets"), rates, goal)


def fastest(rates: dict[str, list[float]], prefix: str) -> str:
    return max((r for r in rates if r.startswith(prefix)), key=lambda rival: statistics.median(rates[rival]))


def median_and_spread(values: list[float], digits: int = 0) -> str:
    median, least, most = (
        f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({least}–{most})"


# Of `time_to_quality`


class Point(NamedTuple):
    """A place on a learning curve."""

    seconds: float
    tokens: int  # useful ones
    bits_per_byte: float


class Race(NamedTuple):
    """When each had the quality that the recipe ends with."""

    goal: float  # bits per byte
    recipe_seconds: float
    seconds: float | None  # None: never
    last: Point  # of ours

    @property
    def share(self) -> float | None:
        """Of the recipe's time."""
        return self.seconds and self.seconds / self.recipe_seconds


def curves_of(result: dict[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """The learning curves of a JSON, by preset and rival."""
    return {
        preset: {rival: [Point(**point) for point in curve] for rival, curve in pair.items()}
        for preset, pair in result["curves"].items()
    }


def races(curves: dict[str, dict[str, list[Point]]]) -> Iterator[tuple[str, Race]]:
    """By preset."""
    for preset, pair in curves.items():
        recipe, ours = pair[RECIPE], pair[OURS]
        goal = recipe[-1].bits_per_byte
        # What the recipe itself needed for it, in case it got worse at the end.
        yield preset, Race(goal, seconds_to(recipe, goal) or 0.0, seconds_to(ours, goal), ours[-1])


def seconds_to(curve: list[Point], bits_per_byte: float) -> float | None:
    """When `curve` is first at or below; straight between its points. None: never."""
    before = None
    for point in curve:
        if point.bits_per_byte <= bits_per_byte:
            if before is None:
                return point.seconds
            part = (before.bits_per_byte - bits_per_byte) / (before.bits_per_byte - point.bits_per_byte)
            return before.seconds + part * (point.seconds - before.seconds)
        before = point
    return None
