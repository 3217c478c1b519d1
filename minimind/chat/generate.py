"""From a prompt to an answer: one streamed, or many in order. Both are thin uses of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from minimind.chat.engine import Engine
from minimind.chat.inference import InferenceModel
from minimind.chat.options import SamplingOptions
from minimind.chat.sampling import STOP_IDS


def generate(
    model: InferenceModel,
    prompt_ids: Sequence[int],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
) -> Iterator[int]:
    """Stream the ids of one answer; it ends before a stop id, or after `options.max_new_tokens`."""
    engine = Engine(model, rows=1, max_length=len(prompt_ids) + options.max_new_tokens)
    return engine.stream(prompt_ids, options, stop_ids)


class Generated(NamedTuple):
    """An answer to one of many prompts."""

    place: int  # of the prompt
    ids: list[int]
    cut: bool  # by `max_new_tokens`


def generate_each(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
    rows: int = 64,
) -> Iterator[Generated]:
    """The answers to many prompts, as they end, each as `generate` would give it alone; `rows` at a time.

    With a seed, prompt i is answered with seed + i: a prompt that comes twice shall have two answers.
    """
    if not prompts:
        return
    longest = max(map(len, prompts)) + options.max_new_tokens
    engine = Engine(model, min(rows, len(prompts)), longest)
    begun: dict[int, tuple[int, list[int]]] = {}  # by the engine's number: place, ids
    for place, prompt in enumerate(prompts):
        own = options if options.seed is None else replace(options, seed=(options.seed + place) % 2**63)
        begun[engine.submit(prompt, own, stop_ids)] = place, []
    while engine.busy:
        for event in engine.step():
            place, ids = begun[event.id]
            if event.token is not None:
                ids.append(event.token)
            if event.finished:
                yield Generated(place, ids, event.finished == "length")


def generate_batch(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
    rows: int = 64,
) -> list[list[int]]:
    """The answers of `generate_each` in the order of their prompts."""
    return [answer.ids for answer in sorted(generate_each(model, prompts, options, stop_ids, rows))]
