"""From logits to tokens: what may be drawn, and the draw, written out by hand.

Rows of a batch belong to different answers, each with options and chance of its own. Nothing here depends on
the other rows, so a seed gives one answer, whoever shares the batch.

Shapes: B rows, V vocabulary, W the window of the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numba import prange
from torch import Tensor

from minimind.chat.kernels import EXP_LIMIT, REORDERED, compiled, exp, share_threads
from minimind.chat.options import SamplingOptions

CONTROL_IDS = (0, 1, 2)  # <|endoftext|> (also padding), <|im_start|>, <|im_end|>
STOP_IDS = (0, 2)  # what may end an answer; the other control ids are never drawn
PENALTY_WINDOW = 64  # tokens; in a longer answer common words such as "的" must come again
GREEDY_BELOW = 1e-4  # temperature; dividing by less overflows, and there is nothing left to chance anyway
NO_ID = -1
LEAST_WEIGHT = math.exp(-EXP_LIMIT)  # what is less likely than this share of the likeliest is never drawn

# What the loops read of a row's options. No limit is a top_k of 0, greedy a temperature of 0.
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
    return draw(logits.float().cpu().numpy(), said, knobs, uniform).tolist()


@compiled(parallel=True)
def draw(logits, said, knobs, uniform):
    """logits (B, V), said (B, W) ids or NO_ID, knobs (B,), uniform numbers (B,) → ids (B,)."""
    ids = np.empty(len(logits), np.int64)
    for row in prange(len(logits)):
        scores = logits[row].copy()
        for token in knobs[row].never:
            if token != NO_ID:
                scores[token] = -np.inf
        penalize(scores, said[row], knobs[row].repetition_penalty)
        ids[row] = draw_one(scores, knobs[row], uniform[row])
    return ids


@compiled()
def penalize(scores, said, penalty):
    """Make tokens that have been said less likely in scores (V,), each once however often it was said.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, 4.1) divides their logits by the penalty. That would raise a
    negative logit, so those are multiplied.
    """
    for place, token in enumerate(said):
        if token != NO_ID and token not in said[:place]:
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty


@compiled()
def draw_one(scores, knobs, uniform):
    """An id of scores (V,): of the top k, in them of the nucleus, in that of what min_p leaves."""
    likeliest = scores.argmax()
    if knobs.temperature == 0:
        return likeliest
    weights, whole = weights_of(scores, scores[likeliest], knobs.temperature)
    if knobs.top_k == 0 and knobs.top_p == 1:
        kept = np.flatnonzero(weights >= max(knobs.min_p, LEAST_WEIGHT))
    else:
        kept = nucleus(weights, whole, knobs)
    place = uniform * mass(weights, kept)
    for token in kept:
        place -= weights[token]
        if place < 0:
            return token
    return likeliest  # where rounding left a last bit


@compiled(fastmath=REORDERED)
def weights_of(scores, largest, temperature):
    """Probabilities of scores (V,), as shares of the likeliest token's, and their sum."""
    weights, whole = np.empty_like(scores), np.float32(0)
    for i in range(len(scores)):
        below = (scores[i] - largest) / temperature
        weights[i] = exp(below) if below > np.float32(-EXP_LIMIT) else np.float32(0)
        whole += weights[i]
    return weights, whole


@compiled()
def nucleus(weights, whole, knobs):
    """The ids of weights (V,), whose sum is `whole`, that top k, top p and min p leave, the likeliest first.

    Only what may be among them is sorted, a few as a rule: that is far less work than all V.
    """
    floor, enough, found = 1.0, False, np.empty(0, np.int64)
    while floor > LEAST_WEIGHT and not enough:
        floor /= 16
        found = np.flatnonzero(weights >= floor)
        if knobs.top_k:
            enough = len(found) >= knobs.top_k
        else:
            enough = floor <= knobs.min_p or mass(weights, found) >= knobs.top_p * whole
    found = found[np.argsort(-weights[found], kind="mergesort")]
    wanted = knobs.top_p * whole
    if knobs.top_k:
        found = found[: knobs.top_k]
        wanted = knobs.top_p * mass(weights, found)
    before = 0.0
    for count, token in enumerate(found):
        if before >= wanted or weights[token] < knobs.min_p:
            return found[:count]
        before += weights[token]
    return found


@compiled()
def mass(weights, ids):
    found = 0.0
    for token in ids:
        found += weights[token]
    return found


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalty, temperature and the like."""

    chosen: float
    top: list[tuple[int, float]]  # the likeliest ids and theirs, falling


def token_logprobs(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of one row's log-probabilities (V,): that of `token`, and the `top` highest."""
    values, ids = logprobs.topk(top)
    return TokenLogprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
