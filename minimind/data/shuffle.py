"""Random orders that take no memory: where an item goes is worked out, not looked up.

The b bits of a number are mixed by steps that can each be undone, which makes any number of them an order of
0 … 2^b - 1. For an order of 0 … n - 1, what falls outside is mixed again until it is inside ("cycle walking",
Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 6


class Shuffle:
    """A random order of each of several ranges 0 … n - 1, drawn from `seed`."""

    def __init__(self, sizes: np.ndarray, seed: Sequence[int]):
        generator = np.random.default_rng(seed)
        bits = np.maximum(np.frexp(np.maximum(sizes, 1) - 1)[1], 1).astype(np.uint64)
        self._sizes = sizes.astype(np.uint64)
        self._masks = (np.uint64(1) << bits) - np.uint64(1)
        self._shifts = (bits + np.uint64(1)) // np.uint64(2)
        factors, addends = generator.integers(0, 1 << 64, (2, ROUNDS, len(sizes)), np.uint64)
        self._steps = list(zip(factors | np.uint64(1), addends, strict=True))  # odd: undone by its inverse

    def __call__(self, ranges: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(k,) int64: what stands at place `items[i]` in the order of range number `ranges[i]`."""
        result = items.astype(np.uint64)
        outside = np.arange(len(items))
        while len(outside):
            which, mixed = ranges[outside], result[outside]
            masks, shifts = self._masks[which], self._shifts[which]
            for factors, addends in self._steps:
                mixed = (mixed * factors[which] + addends[which]) & masks
                mixed ^= mixed >> shifts
            result[outside] = mixed
            outside = outside[mixed >= self._sizes[which]]
        return result.astype(np.int64)
