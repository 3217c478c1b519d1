"""The draw of a token from logits: loops, which Numba compiles, as those of `kernels.py`.

Shapes: M rows, W ids said lately, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from minimind.chat.kernels import EXP_LIMIT, exp
from minimind.chat.vectors import largest_of, total
from minimind.loops import compiled

NO_ID = -1  # fills up lists of ids
LEAST_WEIGHT = math.exp(-EXP_LIMIT)  # what is less likely than this share of the likeliest is never drawn


@compiled(parallel=True)
def draw(logits, said, lengths, knobs, uniform):
    """logits (M, V), ids said lately (M, W), `sampling.KNOBS` (M,), numbers in [0, 1) (M,) → ids (M,).

    The ids are put among those that were said, in place of the oldest; lengths (M,) count them.
    """
    ids = np.empty(len(logits), np.int64)
    for row in prange(len(logits)):
        scores = logits[row].copy()
        for token in knobs[row].never:
            if token != NO_ID:
                scores[token] = -np.inf
        penalize(scores, said[row], knobs[row].repetition_penalty)
        ids[row] = said[row, lengths[row] % said.shape[1]] = draw_one(scores, knobs[row], uniform[row])
        lengths[row] += 1
    return ids


@compiled()
def penalize(scores, said, penalty):
    """Make tokens that have been said less likely in scores (V,), each once however often it was said.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, 4.1) divides their logits by the penalty. That would raise a
    negative logit, so those are multiplied.
    """
    before = scores[said]  # of a token said twice too
    for place, token in enumerate(said):
        if token != NO_ID:
            score = before[place]
            scores[token] = score / penalty if score > 0 else score * penalty


@compiled()
def draw_one(scores, knobs, uniform):
    """An id of scores (V,): of the top k, in them of the nucleus, in that of what min_p leaves."""
    likeliest = place_of(largest_of(scores), scores)
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


@compiled()
def place_of(number, numbers):
    """The first place of a number that is among numbers (V,). Most are passed over in vectors."""
    for first in range(0, len(numbers), 64):
        part, found = numbers[first : first + 64], False
        for i in range(len(part)):
            found |= part[i] == number
        if found:
            for i in range(len(part)):
                if part[i] == number:
                    return first + i
    return 0  # no number, which equals nothing


@compiled()
def weights_of(scores, largest, temperature):
    """Probabilities of scores (V,), as shares of the likeliest token's, and their sum."""
    weights = np.empty_like(scores)
    for i in range(len(scores)):
        below = (scores[i] - largest) / temperature
        weights[i] = exp(below) if below > np.float32(-EXP_LIMIT) else np.float32(0)
    return weights, total(weights)


@compiled()
def nucleus(weights, whole, knobs):
    """The ids, rising, of weights (V,), whose sum is `whole`, that top k, top p and min p leave.

    Only what may be among them is looked at again and again, a few as a rule: far less than all V.
    """
    floor, enough, found = 1.0, False, np.empty(0, np.int64)
    while floor > LEAST_WEIGHT and not enough:
        floor /= 16
        found = np.flatnonzero(weights >= floor)
        if knobs.top_k:
            enough = len(found) >= knobs.top_k
        else:
            enough = floor <= knobs.min_p or mass(weights, found) >= knobs.top_p * whole
    if knobs.top_k:
        found = likeliest_of(found, weights[found], np.ones(len(found), np.float32), knobs.top_k)
        whole = mass(weights, found)
    own = weights[found]
    found = likeliest_of(found, own, own, knobs.top_p * whole)
    return found[weights[found] >= knobs.min_p]


@compiled()
def likeliest_of(ids, weights, sizes, wanted):
    """Of ids (M,), those of the largest weights (M,) whose sizes (M,) are `wanted` together, or more by one.

    Of equal weights the first count. Nothing is sorted: halving an interval finds the smallest that does.
    """
    bits, counted = weights.view(np.int32), np.empty_like(sizes)  # bits of positive numbers are ordered alike
    low, high = 0, 0x7F800000  # infinity
    while high - low > 1:
        middle = (low + high) // 2
        for i in range(len(bits)):
            counted[i] = sizes[i] if bits[i] >= middle else np.float32(0)
        if total(counted) >= wanted:
            low = middle
        else:
            high = middle
    kept = bits > low
    there = mass(sizes, np.flatnonzero(kept))
    for place in np.flatnonzero(bits == low):
        kept[place] = there < wanted
        there += sizes[place]
    return ids[kept]


@compiled()
def mass(weights, ids):
    found = 0.0
    for token in ids:
        found += weights[token]
    return found
