"""From logits to tokens: what may be drawn. The draw itself is a loop of `draws.py`.

Rows of a batch belong to different answers, each with options and chance of its own. Nothing here depends on
the other rows, so a seed gives one answer, whoever shares the batch.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
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
    """Draws the tokens of up to `rows` answers.

    All that a draw needs stays in arrays: making them anew took longer than the draw.
    """

    def __init__(self, rows: int) -> None:
        self.knobs = np.zeros(rows, KNOBS)
        self.said = np.full((rows, PENALTY_WINDOW), NO_ID)  # lately, in no order
        self.lengths = np.zeros(rows, np.int64)  # of the answers
        self.chances: list[Random] = [Random(0)] * rows

    def begin(self, row: int, options: SamplingOptions, stop_ids: Collection[int] = STOP_IDS) -> None:
        """Have a new answer in a row."""
        temperature = options.temperature if options.temperature >= GREEDY_BELOW else 0
        top_k = min(options.top_k or 0, 2**31)
        never = [NO_ID if i in stop_ids else i for i in CONTROL_IDS]
        self.knobs[row] = temperature, top_k, options.top_p, options.min_p, options.repetition_penalty, never
        self.said[row], self.lengths[row] = NO_ID, 0
        self.chances[row] = Random(options.seed)  # None: seeded by the system

    def move(self, source: int, target: int) -> None:
        self.knobs[target], self.said[target] = self.knobs[source], self.said[source]
        self.lengths[target], self.chances[target] = self.lengths[source], self.chances[source]

    def uniform(self, rows: int) -> list[float]:
        """Numbers in [0, 1), each of which decides a draw.

        They come from Python's generator, so that a seed means the same on every machine.
        """
        return [chance.getrandbits(24) / 2**24 for chance in self.chances[:rows]]

    def draw(self, logits: Tensor) -> list[int]:
        """The next ids of the first rows, from logits (B, V).

        Those of a GPU come to the host, which must learn the tokens anyway: so it waits once for each.
        """
        rows = len(logits)
        uniform = np.array(self.uniform(rows))
        share_threads()
        state = self.said[:rows], self.lengths[:rows], self.knobs[:rows]
        return draw(logits.cpu().numpy(), *state, uniform).tolist()


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalty, temperature and the like."""

    chosen: float
    top: list[tuple[int, float]]  # the likeliest ids and theirs, falling


def token_logprobs(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of one row's log-probabilities (V,): that of `token`, and the `top` highest."""
    values, ids = logprobs.topk(top)
    return TokenLogprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
