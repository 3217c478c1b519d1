"""From logits to tokens: what may be drawn, and the draw, written out by hand.

Rows of a batch belong to different answers, each with options and chance of its own. Nothing here depends on
the other rows, so a seed gives one answer, whoever shares the batch.

Shapes: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from minimind.chat.options import SamplingOptions

CONTROL_IDS = (0, 1, 2)  # <|endoftext|> (also padding), <|im_start|>, <|im_end|>
STOP_IDS = (0, 2)  # what may end an answer; the other control ids are never drawn
PENALTY_WINDOW = 64  # tokens; in a longer answer common words such as "的" must come again
CANDIDATES = 64  # tokens; most nuclei are smaller, and these are far cheaper to find than to sort V
GREEDY_BELOW = 1e-4  # temperature; dividing by less overflows, and there is nothing left to chance anyway


class Sampler:
    """How the tokens of one answer are drawn.

    One uniform number decides each draw. It comes from Python's generator: a seed then means the same on
    every device, and an answer keeps no generator there.
    """

    def __init__(self, options: SamplingOptions, stop_ids: Collection[int] = STOP_IDS) -> None:
        self.options = options
        self.never = [i for i in CONTROL_IDS if i not in stop_ids]
        self.greedy = options.temperature < GREEDY_BELOW
        # Whether any token may be drawn.
        self.whole = options.top_k is None and options.top_p == 1 and options.min_p == 0
        self._random = Random(options.seed)  # None: seeded by the system

    def uniform(self) -> float:
        """In [0, 1), and exact in fp32: rounding to 1 would choose a token behind the last."""
        return self._random.getrandbits(24) / 2**24


def sample(logits: Tensor, samplers: Sequence[Sampler], answers: Sequence[Sequence[int]]) -> list[int]:
    """Draw an id for each row of `logits` (B, V), which this changes; `answers` are the tokens so far."""
    forbid(logits, [sampler.never for sampler in samplers])
    penalties = [sampler.options.repetition_penalty for sampler in samplers]
    penalize_repetition(logits, [answer[-PENALTY_WINDOW:] for answer in answers], penalties)

    uniform = logits.new_tensor([0 if sampler.greedy else sampler.uniform() for sampler in samplers])  # (B,)
    rows_of = defaultdict(list)  # rows that are drawn alike are drawn together
    for row, sampler in enumerate(samplers):
        rows_of[argmax if sampler.greedy else draw if sampler.whole else draw_likely].append(row)
    if len(rows_of) == 1:
        return next(iter(rows_of))(logits, samplers, uniform).tolist()
    ids = [0] * len(samplers)
    for function, rows in rows_of.items():
        drawn = function(logits[rows], [samplers[row] for row in rows], uniform[rows]).tolist()
        for row, token in zip(rows, drawn, strict=True):
            ids[row] = token
    return ids


def forbid(logits: Tensor, never: Sequence[Sequence[int]]) -> None:
    width = logits.shape[1]
    places = [row * width + token for row, ids in enumerate(never) for token in ids]
    if places:
        logits.view(-1)[torch.tensor(places, device=logits.device)] = -torch.inf


def penalize_repetition(logits: Tensor, said: Sequence[Sequence[int]], penalties: Sequence[float]) -> None:
    """Make the tokens that a row has said less likely, each once however often it was said.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, 4.1) divides their logits by the penalty. That would raise a
    negative logit, so those are multiplied.
    """
    width = logits.shape[1]
    places, factors = [], []
    for row, (tokens, penalty) in enumerate(zip(said, penalties, strict=True)):
        if penalty != 1:
            distinct = set(tokens)
            places += [row * width + token for token in distinct]
            factors += [penalty] * len(distinct)
    if places:
        index, factor = torch.tensor(places, device=logits.device), logits.new_tensor(factors)
        scores = logits.view(-1)[index]
        logits.view(-1)[index] = torch.where(scores > 0, scores / factor, scores * factor)


def argmax(logits: Tensor, _samplers: Sequence[Sampler], _uniform: Tensor) -> Tensor:
    return logits.max(-1).indices  # on a CPU `argmax` takes longer


def draw(logits: Tensor, samplers: Sequence[Sampler], uniform: Tensor) -> Tensor:
    """Draw from all tokens: logits (B, V), uniform numbers (B,) → ids (B,)."""
    return invert(probabilities_of(logits, samplers), uniform)


def draw_likely(
    logits: Tensor, samplers: Sequence[Sampler], uniform: Tensor, width: int = CANDIDATES
) -> Tensor:
    """Draw from the top k, the nucleus in them, what min_p leaves: logits (B, V), uniform (B,) → ids (B,).

    Only the `width` likeliest tokens are looked at; rows whose nucleus is wider are drawn anew among more.
    """
    options = [sampler.options for sampler in samplers]
    top_k = [[min(option.top_k or 0, logits.shape[1])] for option in options]  # 0: no such limit
    top_p = logits.new_tensor([[option.top_p] for option in options])  # (B, 1)
    min_p = logits.new_tensor([[option.min_p] for option in options])  # (B, 1)
    width = max(min(width, logits.shape[1]), *(k for (k,) in top_k))

    values, ids = probabilities_of(logits, samplers).topk(width)  # (B, C), falling
    sums = values.cumsum(-1)
    before = sums - values  # share of the tokens that are likelier
    least = min_p * values[:, :1]  # (B, 1)
    enough = (sums[:, -1:] >= top_p) | (values[:, -1:] < least)  # (B, 1)
    wide = [row for row, (whole,) in enumerate(enough.tolist()) if not whole]
    if any(k for (k,) in top_k):
        kept = torch.tensor(top_k, device=logits.device)  # (B, 1)
        top_p = torch.where(kept > 0, top_p * sums.gather(-1, (kept - 1).clamp(min=0)), top_p)
        values.masked_fill_((kept > 0) & (torch.arange(width, device=logits.device) >= kept), 0)
    nucleus = values.masked_fill((before >= top_p) | (values < least), 0)
    drawn = ids.gather(-1, invert(nucleus, uniform)[:, None])[:, 0]
    wide = [row for row in wide if not top_k[row][0] and width < logits.shape[1]]
    if wide:
        drawn[wide] = draw_likely(logits[wide], [samplers[row] for row in wide], uniform[wide], 8 * width)
    return drawn


def probabilities_of(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    temperatures = logits.new_tensor([[sampler.options.temperature] for sampler in samplers])  # (B, 1)
    return (logits / temperatures).softmax(-1)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place where the running sum of a row of `weights` (B, C) passes `uniform` (B,) of its total."""
    sums = weights.cumsum(-1)  # (B, C)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalty, temperature and the like."""

    chosen: float
    top: list[tuple[int, float]]  # the likeliest ids and theirs, falling


def token_logprobs(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of one row's log-probabilities (V,): that of `token`, and the `top` highest."""
    values, ids = logprobs.topk(top)
    return TokenLogprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))
