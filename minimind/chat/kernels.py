"""What a CPU computes for prompts and for the next token of a few answers: loops, which Numba compiles.

Shapes: M tokens of any rows, R of them or of their heads, I inputs, H hidden size, N query heads, K key/value
heads, D head width. Arrays are contiguous, and numbers fp32, where nothing else is said.
"""

from __future__ import annotations

import threading

import numba
import numpy as np
import torch
from numba import prange

from minimind.chat.tiles import ROWS, WIDTH, tile
from minimind.chat.vectors import as_held, largest_of, total
from minimind.loops import compiled, inlined

EXP_LIMIT = 87  # e to the 89 is no fp32 number, and to the -88 none of full precision

_known = threading.local()  # how many threads `share_threads` has told Numba of


def share_threads() -> None:
    """Let the loops that this thread calls use as many threads as PyTorch's operations do."""
    threads = torch.get_num_threads()
    if getattr(_known, "threads", None) == threads:
        return
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # The first time starts Numba's, and tells the OpenMP that serves both to use one for each core.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _known.threads = threads


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


@compiled()
def rms_norm(x, weight, eps):
    """x (M, H) / rms(x) · weight (H,)."""
    out = x * x
    for row in range(x.shape[0]):
        factor = np.float32(1 / np.sqrt(total(out[row]) / np.float32(x.shape[1]) + eps))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * factor * weight[i]
    return out


@inlined
def rotate(pairs, rotation, out):
    """Multiply complex numbers (D,), real and imaginary parts in turn."""
    for i in range(len(pairs) // 2):  # in steps of 2 it would not become vectors
        real, imaginary = 2 * i, 2 * i + 1
        out[real] = pairs[real] * rotation[real] - pairs[imaginary] * rotation[imaginary]
        out[imaginary] = pairs[real] * rotation[imaginary] + pairs[imaginary] * rotation[real]


@compiled(parallel=True)
def attend(qkv, rotation, keys, values, rows, positions):
    """Keep the keys and values of new tokens, and let each attend to those of its row up to itself.

    qkv (M, N + 2K, D): queries, keys, values; rotation (positions, D); keys and values as in
    `packed.PackedCache`, for one layer; rows, positions (M,): where each token is, those of a row side by
    side → (M, N, D).
    """
    tokens, groups = len(qkv), keys.shape[1]
    heads = qkv.shape[1] - 2 * groups
    each = heads // groups  # that share keys
    alone = True
    for token in range(1, tokens):
        alone &= rows[token] != rows[token - 1]
    if not alone:
        keep_all(qkv, rotation, keys, values, rows, positions)
    out = np.empty((tokens, heads, qkv.shape[2]), np.float32)
    for place in prange(groups * tokens):
        group, token = place // tokens, place % tokens
        row, position, first = rows[token], positions[token], group * each
        if alone:  # nobody else needs what the token keeps
            key, value = qkv[token, heads + group], qkv[token, heads + groups + group]
            keep(key, value, rotation[position], keys[row, group], values[row, group], position)
        following = min(place + 1, groups * tokens - 1)  # what it reads is fetched meanwhile
        next_row, next_group = rows[following % tokens], following // tokens
        later = keys[next_row, next_group], values[next_row, next_group]
        queries, own = qkv[token, first : first + each], out[token, first : first + each]
        attend_to(queries, rotation[position], keys[row, group], values[row, group], position + 1, later, own)
    return out


@compiled(parallel=True)
def keep_all(qkv, rotation, keys, values, rows, positions):
    """Keep the keys and values of new tokens; all as for `attend`."""
    groups = keys.shape[1]
    heads = qkv.shape[1] - 2 * groups
    for token in prange(len(qkv)):
        row, position = rows[token], positions[token]
        for group in range(groups):
            key, value = qkv[token, heads + group], qkv[token, heads + groups + group]
            keep(key, value, rotation[position], keys[row, group], values[row, group], position)


@inlined
def attend_to(queries, rotation, keys, values, seen, later, out):
    """Attention of queries (R, D), to be rotated, to the first keys and values of their row and group.

    later: the keys and values of whoever comes next.
    """
    rotated = np.empty(queries.shape, np.float32)
    for head in range(len(queries)):
        rotate(queries[head], rotation, rotated[head])
    scores = product(rotated, keys, (seen + WIDTH - 1) // WIDTH, later[0])
    totals = np.empty(len(queries), np.float32)
    for head in range(len(queries)):
        totals[head] = exp_of_scores(scores[head], seen, np.float32(1 / np.sqrt(queries.shape[1])))
    attended = product(scores[:, :seen], values, len(values), later[1])
    for head in range(len(queries)):
        divide(attended[head], totals[head], out[head])


@inlined
def keep(key, value, rotation, keys, values, position):
    """Put a key (D,), rotated, and a value (D,) in their places among those of one row and group."""
    rotated = np.empty_like(key)
    rotate(key, rotation, rotated)
    for i in range(len(key)):
        keys[position // WIDTH, i, position % WIDTH] = as_held(rotated[i], keys)
        values[i // WIDTH, position, i % WIDTH] = as_held(value[i], values)


@compiled()
def divide(numbers, by, out):
    for i in range(len(out)):
        out[i] = numbers[i] / by


@inlined
def product(x, blocks, count, later):
    """x (M, I) times the first `count` of some blocks (B, ≥ I, WIDTH) → (M, count · WIDTH).

    Meanwhile as much of `later` (B, ≥ I, WIDTH) is fetched.
    """
    out = np.empty((len(x), count * WIDTH), np.float32)
    for first in range(0, len(x), ROWS):
        last = min(first + ROWS, len(x))
        for block in range(count):
            tile(x, blocks, out, block, first, last, None, later[block].ctypes.data)
    return out


@inlined
def exp_of_scores(scores, count, factor):
    """Replace the first scores by e to `factor` times what each is above the largest; their sum."""
    largest = largest_of(scores[:count])
    for i in range(count):
        scores[i] = exp((scores[i] - largest) * factor)
    return total(scores[:count])


@compiled()
def swiglu(gate_up):
    """silu(gate) · up: (M, 2I) → (M, I)."""
    width = gate_up.shape[1] // 2
    out = np.empty((gate_up.shape[0], width), np.float32)
    for row in range(gate_up.shape[0]):
        for i in range(width):
            gate = gate_up[row, i]
            out[row, i] = gate / (np.float32(1) + exp(-gate)) * gate_up[row, width + i]
    return out
