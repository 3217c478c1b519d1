"""A CPU's network in one call, which Numba compiles: for the next token of a few answers, or for prompts.

A token is so little work that calling PyTorch's operations one by one takes longer than what they do. Even a
call for each layer took up to a seventh of the time, to hand over its arrays. The first call on a machine
compiles, for some seconds; the code is kept beside this file or in the user's cache.

Shapes: M tokens of any rows, H hidden size, E experts, S that all tokens visit, D head width, V vocabulary.
Numbers are fp32 where nothing else is said.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from minimind.chat.kernels import attend, exp, keep_all, rms_norm, swiglu
from minimind.chat.tiles import Packed, multiply
from minimind.chat.vectors import total
from minimind.loops import compiled


class MLPWeights(NamedTuple):
    gate_up: Packed
    down: Packed


class MixtureWeights(NamedTuple):
    top_k: int
    gate: np.ndarray  # (E, H)
    experts: MLPWeights  # (E + S, …): first those that the gate sends tokens to


class LayerWeights(NamedTuple):
    """Of one layer; or of all, then each array has one dimension more, the first."""

    eps: float  # of both norms
    attention_norm: np.ndarray  # (H,)
    mlp_norm: np.ndarray  # (H,)
    qkv: Packed
    output: Packed
    mlp: MLPWeights | MixtureWeights


class Weights(NamedTuple):
    rotation: np.ndarray  # (positions, D)
    layers: LayerWeights
    norm: np.ndarray  # (H,)
    head: Packed


def part(weights, number):
    """Those of one layer, or of one expert, of weights of all."""


@overload(part)
def _part(weights, number):
    if isinstance(weights, types.Array):
        return lambda weights, number: weights[number]
    if isinstance(weights, types.BaseNamedTuple):
        return PARTS[weights.instance_class]
    return lambda weights, number: weights  # the same for all


PARTS = {
    Packed: lambda weights, number: Packed(
        weights.outputs,
        part(weights.weight, number),
        part(weights.start, number),
        part(weights.scale, number),
    ),
    MLPWeights: lambda weights, number: MLPWeights(part(weights.gate_up, number), part(weights.down, number)),
    MixtureWeights: lambda weights, number: MixtureWeights(
        weights.top_k, weights.gate[number], part(weights.experts, number)
    ),
    LayerWeights: lambda weights, number: LayerWeights(
        weights.eps,
        weights.attention_norm[number],
        weights.mlp_norm[number],
        part(weights.qkv, number),
        part(weights.output, number),
        part(weights.mlp, number),
    ),
}


@compiled()
def run(x, weights, keys, values, rows, positions, wanted):
    """Keep the keys and values of new tokens x (M, H), embedded, for those that follow.

    keys and values as in `packed.PackedCache`; rows, positions (M,): where each token is, those of a row side
    by side; wanted: whether anybody reads what follows each token, in fp32 (M, V).
    """
    for number in range(len(keys)):
        layer, own_keys, own_values = part(weights.layers, number), keys[number], values[number]
        normed = rms_norm(x, layer.attention_norm, layer.eps)
        qkv = multiply(normed, layer.qkv).reshape(len(x), -1, weights.rotation.shape[1])
        if number == len(keys) - 1 and not wanted:
            keep_all(qkv, weights.rotation, own_keys, own_values, rows, positions)
            break
        attended = attend(qkv, weights.rotation, own_keys, own_values, rows, positions)
        x = x + multiply(attended.reshape(len(x), -1), layer.output)
        x = x + feed_forward(rms_norm(x, layer.mlp_norm, layer.eps), layer.mlp)
    else:
        return multiply(rms_norm(x, weights.norm, weights.layers.eps), weights.head)
    return np.empty((0, 0), np.float32)


def feed_forward(x, weights):
    """Of one MLP or a mixture: x (M, H) → (M, H)."""


@overload(feed_forward)
def _feed_forward(x, weights):
    if weights.instance_class is MixtureWeights:
        return lambda x, weights: mixture(x, weights)
    return lambda x, weights: mlp(x, weights)


@compiled()
def mlp(x, weights):
    return multiply(swiglu(multiply(x, weights.gate_up)), weights.down)


@compiled()
def mixture(x, weights):
    """Experts that no token visits are not read."""
    shares = route(x, weights.gate, weights.top_k, len(weights.experts.down.weight))
    out = np.zeros_like(x)
    for number in range(shares.shape[1]):
        visitors = np.flatnonzero(shares[:, number])
        if len(visitors):
            sent = np.empty((len(visitors), x.shape[1]), np.float32)
            for place, row in enumerate(visitors):
                sent[place] = x[row]
            back = mlp(sent, part(weights.experts, number))
            for place, row in enumerate(visitors):
                add_times(back[place], shares[row, number], out[row])
    return out


@compiled()
def route(x, gate, top_k, experts):
    """The share of each expert in a token's result (M, experts).

    To those of the gate (E, H) it is the softmax over the best k, the others 0; to those that all visit 1.
    """
    shares = np.ones((len(x), experts), np.float32)
    for row in range(len(x)):
        scores = np.empty(len(gate), np.float32)
        for expert in range(len(gate)):
            scores[expert] = total(x[row] * gate[expert])
            shares[row, expert] = 0
        best, whole = scores.max(), np.float32(0)
        for _ in range(top_k):
            likeliest = scores.argmax()
            shares[row, likeliest] = exp(scores[likeliest] - best)
            whole += shares[row, likeliest]
            scores[likeliest] = -np.inf
        for expert in range(len(gate)):
            shares[row, expert] /= whole
    return shares


@compiled()
def add_times(numbers, factor, out):
    for i in range(len(out)):
        out[i] += numbers[i] * factor
