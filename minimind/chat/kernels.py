"""What a CPU computes for the next token of a few answers: loops, which Numba compiles.

A token is so little work that calling PyTorch's operations one by one takes longer than what they do. One
function here takes the place of ten of them, on arrays that share the memory of the tensors. The first call
on a machine compiles, for some seconds; the code is kept beside this file or in the user's cache.

Shapes: M rows with one token each, I inputs, O outputs, N query heads, K key/value heads, D head width, S
positions, V vocabulary. Arrays are contiguous, and numbers fp32, where nothing else is said.
"""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np
import torch
from numba import prange

from minimind.loops import compiled

# Vector instructions need sums in another order. What is infinite or no number stays so.
REORDERED = {"reassoc", "contract", "nsz"}
EXP_LIMIT = 87  # e to the 89 is no fp32 number, and to the -88 none of full precision
NO_ID = -1  # fills up lists of ids
LEAST_WEIGHT = math.exp(-EXP_LIMIT)  # what is less likely than this share of the likeliest is never drawn


def share_threads() -> None:
    """Let the loops that this thread calls use as many threads as PyTorch's operations do."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # The first time starts Numba's, and tells the OpenMP that serves both to use one for each core.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@compiled(fastmath={"contract"})
def exp(x):
    """e to the x, at most EXP_LIMIT either way, to 3e-7. Loops of it become vectors, np.exp's not."""
    x = min(max(x, np.float32(-EXP_LIMIT)), np.float32(EXP_LIMIT))
    power = np.rint(x * np.float32(1.442695041))
    # ln 2 in two parts, of which the first has few digits, so that its product is exact. |rest| < 0.35
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1 / 720) * rest + np.float32(1 / 120)
    series = (series * rest + np.float32(1 / 24)) * rest + np.float32(1 / 6)
    series = ((series * rest + np.float32(1 / 2)) * rest + np.float32(1)) * rest + np.float32(1)
    return series * np.int32((np.int32(power) + 127) << 23).view(np.float32)


@compiled(fastmath=REORDERED)
def rms_norm(x, weight, eps):
    """x (M, H) / rms(x) · weight (H,)."""
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        squares = np.float32(0)
        for i in range(x.shape[1]):
            squares += x[row, i] * x[row, i]
        factor = np.float32(1 / np.sqrt(squares / np.float32(x.shape[1]) + eps))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * factor * weight[i]
    return out


@compiled(fastmath=REORDERED)
def rotate(pairs, rotation, out):
    """Multiply complex numbers (D,), real and imaginary parts in turn."""
    for i in range(0, len(pairs), 2):
        out[i] = pairs[i] * rotation[i] - pairs[i + 1] * rotation[i + 1]
        out[i + 1] = pairs[i] * rotation[i + 1] + pairs[i + 1] * rotation[i]


@compiled(parallel=True, fastmath=REORDERED)
def attend(qkv, rotation, cache, positions):
    """Rotate and keep the key of one new token in each row, and let it attend to all up to itself.

    qkv (M, N + 2K, D): queries, keys, values; rotation (positions, D); cache (≥ M, 2K, S, D): keys, then
    values; positions (M,) → (M, N, D).
    """
    rows, groups, width = qkv.shape[0], cache.shape[1] // 2, qkv.shape[2]
    heads = qkv.shape[1] - 2 * groups
    for row in range(rows):
        here = positions[row]
        for group in range(groups):
            rotate(qkv[row, heads + group], rotation[here], cache[row, group, here])
            cache[row, groups + group, here] = qkv[row, heads + groups + group]
    out = np.zeros((rows, heads, width), np.float32)
    for place in prange(rows * heads):
        row, head = place // heads, place % heads
        group, seen = head // (heads // groups), positions[row] + 1
        keys, values = cache[row, group], cache[row, groups + group]
        query, scores, attended = np.empty(width, np.float32), np.empty(seen, np.float32), out[row, head]
        rotate(qkv[row, head], rotation[positions[row]], query)
        largest = np.float32(-np.inf)
        for s in range(seen):
            product = np.float32(0)
            for i in range(width):
                product += query[i] * keys[s, i]
            scores[s] = product / np.float32(np.sqrt(width))
            largest = max(largest, scores[s])
        total = np.float32(0)
        for s in range(seen):
            scores[s] = exp(scores[s] - largest)
            total += scores[s]
        for s in range(seen):
            for i in range(width):
                attended[i] += scores[s] * values[s, i]
        for i in range(width):
            attended[i] /= total
    return out


@compiled()
def round_rows(x):
    """x (M, I) → the nearest multiples, in int8, of a step for each row; and the steps (M,)."""
    rounded, steps = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    bits = x.view(np.int32)
    for row in range(x.shape[0]):
        largest = np.int32(0)  # bits of positive numbers are ordered as they are, and compared in vectors
        for i in range(x.shape[1]):
            largest = max(largest, np.int32(bits[row, i] & 0x7FFFFFFF))
        step = max(np.int32(largest).view(np.float32), np.float32(1e-12)) / np.float32(127)
        factor = np.float32(1) / step
        for i in range(x.shape[1]):
            rounded[row, i] = np.int32(np.rint(x[row, i] * factor))
        steps[row] = step
    return rounded, steps


@compiled()
def rescale(sums, steps, scale):
    """sums (M, O) of int32, times the step of their row (M,) and the scale of their output (O,)."""
    out = np.empty(sums.shape, np.float32)
    for row in range(sums.shape[0]):
        step = steps[row]
        for o in range(sums.shape[1]):
            out[row, o] = np.float32(sums[row, o]) * step * scale[o]
    return out


@compiled(parallel=True)
def integer_loop(x, weight):
    """x (M, I) and weight (O, I), both int8 → (M, O) in int32, an output's sums side by side."""
    out = np.empty((weight.shape[0], x.shape[0]), np.int32)
    for o in prange(weight.shape[0]):
        for row in range(x.shape[0]):
            total = np.int32(0)
            for i in range(weight.shape[1]):
                total = np.int32(total + np.int32(x[row, i]) * np.int32(weight[o, i]))
            out[o, row] = total
    return out.T


def integer_product(x, weight):
    """The same; of several rows by PyTorch where that is exact, since it takes AMX.

    Its second factor is turned into an order of its own at each call, so that is not the weight.
    """
    if len(x) == 1 or not pytorch_is_exact():
        return integer_loop(x, weight)
    return torch._int_mm(torch.from_numpy(weight), torch.from_numpy(x).t()).t().numpy()


@cache
def pytorch_is_exact() -> bool:
    """Whether its products of int8 are. Without VNNI they clip sums of two to 16 bits."""
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


@compiled(fastmath=REORDERED)
def swiglu(gate_up):
    """silu(gate) · up: (M, 2I) → (M, I)."""
    width = gate_up.shape[1] // 2
    out = np.empty((gate_up.shape[0], width), np.float32)
    for row in range(gate_up.shape[0]):
        for i in range(width):
            gate = gate_up[row, i]
            out[row, i] = gate / (np.float32(1) + exp(-gate)) * gate_up[row, width + i]
    return out


# Several of the above in one call, between two products in int8.


@compiled()
def norm_to_int8(x, weight, eps):
    return round_rows(rms_norm(x, weight, eps))


@compiled()
def attend_in_int8(sums, steps, scale, rotation, cache, positions):
    rows, width = sums.shape[0], rotation.shape[1]
    qkv = rescale(sums, steps, scale).reshape(rows, -1, width)
    return round_rows(attend(qkv, rotation, cache, positions).reshape(rows, -1))


@compiled()
def swiglu_in_int8(sums, steps, scale):
    return round_rows(swiglu(rescale(sums, steps, scale)))


@compiled()
def add_in_int8(x, sums, steps, scale):
    return x + rescale(sums, steps, scale)


def int8_layer(x, rotation, cache, positions, norm, mlp_norm, eps, qkv, output, gate_up, down):
    """A decoder layer in int8: x (M, H) → (M, H). Each matrix is (weight, scale)."""
    rounded, steps = norm_to_int8(x, norm, eps)
    sums = integer_product(rounded, qkv[0])
    rounded, steps = attend_in_int8(sums, steps, qkv[1], rotation, cache, positions)
    x = add_in_int8(x, integer_product(rounded, output[0]), steps, output[1])
    rounded, steps = norm_to_int8(x, mlp_norm, eps)
    rounded, steps = swiglu_in_int8(integer_product(rounded, gate_up[0]), steps, gate_up[1])
    return add_in_int8(x, integer_product(rounded, down[0]), steps, down[1])


# The draw of a token.


@compiled(parallel=True)
def draw(logits, said, knobs, uniform):
    """logits (M, V), ids said lately (M, W), `sampling.KNOBS` (M,), numbers in [0, 1) (M,) → ids (M,)."""
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
