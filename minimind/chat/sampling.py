"""From logits to tokens: what may be drawn. The draw itself is a loop of `draws.py`.

Rows of a batch belong to different answers, each with options and chance of its own. Nothing here depends on
the other rows, so a seed gives one answer, whoever shares the batch.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minimind.chat.draws import NO_ID, draw
from minimind.chat.kernels import share_threads
from minimind.chat.options import SamplingOptions

CONTROL_IDS = (0, 1, 2)  # <|endoftext|> (also padding), <|im_start|>, <|im_end|>
STOP_IDS = (0, 2)  # what may end an answer; the other control ids are never drawn
PENALTY_WINDOW = 64  # tokens; in a longer answer common words such as "的" must come again
GREEDY_BELOW = 1e-4  # temperature; dividing by less overflows, and there is nothing left to chance anyway

# What `draws.draw` reads of a row's options. No limit is a top_k of 0, greedy a temperature of 0.
KNOBS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float32),
        ("never", np.int64, len(CONTROL_IDS)),
    ]
)


class Sampler:
    """How the tokens of one answer are drawn.

    One uniform number decides each draw. It comes from Python's generator, so that a seed means the same on
    every machine.
    """

    def __init__(self, options: SamplingOptions, stop_ids: Collection[int] = STOP_IDS) -> None:
        temperature = options.temperature if options.temperature >= GREEDY_BELOW else 0
        top_k = min(options.top_k or 0, 2**31)
        never = [NO_ID if i in stop_ids else i for i in CONTROL_IDS]
        self.knobs = (temperature, top_k, options.top_p, options.min_p, options.repetition_penalty, never)
        self._random = Random(options.seed)  # None: seeded by the system

    def uniform(self) -> float:
        """In [0, 1)."""
        return self._random.getrandbits(24) / 2**24


def sample(logits: Tensor, samplers: Sequence[Sampler], answers: Sequence[Sequence[int]]) -> list[int]:
    """Draw an id for each row of `logits` (B, V); `answers` are the tokens so far.

    Logits of a GPU come to the host, which must learn the tokens anyway: so it waits once for each.
    """
    said = np.full((len(answers), PENALTY_WINDOW), NO_ID)
    for row, answer in enumerate(answers):
        recent = answer[-PENALTY_WINDOW:]
        said[row, : len(recent)] = recent
    knobs = np.array([sampler.knobs for sampler in samplers], KNOBS)
    uniform = np.array([sampler.uniform() for sampler in samplers])
    share_threads()
    return draw(logits.cpu().numpy(), said, knobs, uniform).tolist()


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalty, temperature and the like."""

    chosen: float
    top: list[tuple[int, float]]  # the likeliest ids and theirs, falling


def token_logprobs(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of one row's log-probabilities (V,): that of `token`, and the `top` highest."""
    values, ids = logprobs.topk(top)
    return TokenLogprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
