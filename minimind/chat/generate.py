"""From a prompt to an answer: one streamed, or many in order. Both are thin uses of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

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
    engine.submit(prompt_ids, options, stop_ids)
    while engine.busy:
        yield from (event.token for event in engine.step() if event.token is not None)


def generate_batch(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    stop_ids: Collection[int] = STOP_IDS,
    rows: int = 64,
) -> list[list[int]]:
    """The answers to many prompts, in their order, each as `generate` would give it alone; `rows` at a time.

    With a seed, prompt i is answered with seed + i: a prompt that comes twice shall have two answers.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts)) + options.max_new_tokens
    engine = Engine(model, min(rows, len(prompts)), longest)
    answers: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        own = options if options.seed is None else replace(options, seed=(options.seed + place) % 2**63)
        answers[engine.submit(prompt, own, stop_ids)] = []
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                answers[event.id].append(event.token)
    return list(answers.values())
