# SPDX-License-Identifier: BSD-3-Clause
"""Stateless randomness: generators keyed by what they are for, and a shuffled stream of indices that can be entered
anywhere.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for; two streams of one seed are independent."""

    SPLIT = 0
    LABELED_ORDER = 1
    UNLABELED_ORDER = 2
    LABELED_WEAK = 3
    UNLABELED_WEAK = 4
    UNLABELED_STRONG = 5
    CLASSES = 6
    COLLECTION_ORDER = 7
    COLLECTION_VIEW = 8
    PK_ORDER = 9
    PK_VIEW = 10
    MULTI_CROP = 11


def generator(seed: int, stream: int, step: int = 0, position: int = 0) -> np.random.Generator:
    """The generator of a place in a run: the same arguments give the same draws, others give independent ones.

    Philox is a counter-based generator: seed and stream are its key, step and position the high words of its counter;
    the low 128 bits count its own draws, so that two places never meet.

    Args:
        seed, stream, step, position: integers in [0, 2^64).
    """
    for name, value in (("seed", seed), ("stream", stream), ("step", step), ("position", position)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it should be in [0, 2^64)")
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, position, step], dtype=np.uint64)  # little-endian words
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


LARGEST_PERMUTATION = 2**20  # entries that a permutation is made of; places of larger ones are computed one by one
ROUNDS = 6


def shuffled(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed bijection of 0 … n−1 takes ``places``, int64, without a table of n entries.

    A Feistel network permutes the numbers of 2h bits, 4^h ≥ n; who is sent beyond n is sent on until below (cycle
    walking: fewer than 4 times on average, Black and Rogaway, CT-RSA 2002).

    Args:
        places: int64 in [0, n).
        n: at most 2^62.
        keys: uint64, one per round.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = places.astype(np.uint64)
    left = np.arange(len(out))
    while len(left):
        high, low = out[left] >> half, out[left] & mask
        for key in keys:
            high, low = low, high ^ (_mixed(low ^ key) & mask)
        out[left] = high << half | low
        left = left[out[left] >= np.uint64(n)]
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """64 bits that depend on all bits of x: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def remaining(places: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """What stands at ``places`` of the numbers 0, 1, … without those of ``left_out``, which are sorted and differ."""
    return places + np.searchsorted(left_out - np.arange(len(left_out)), places, side="right")


class IndexStream:
    """Endless shuffled epochs of 0 … n−1: position p of the stream is element p mod n of the permutation of epoch ⌊p /
    n⌋. Where n is above 2²⁰, no permutation is in memory.

    Args:
        n: indices of an epoch.
        seed: seed of the permutations.
        stream: streams of one seed are shuffled independently.
    """

    def __init__(self, n: int, seed: int, *, stream: int = Stream.LABELED_ORDER) -> None:
        if n < 1:
            raise ValueError(f"n is {n}; it should be at least 1")
        self.n, self.seed, self.stream = n, seed, stream
        self._recent: dict[int, np.ndarray] = {}

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """The indices at positions [step · batch_size, (step + 1) · batch_size), int64."""
        if step < 0:
            raise ValueError(f"step is {step}; it should be at least 0")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
        start, stop = step * batch_size, (step + 1) * batch_size
        epochs = range(start // self.n, (stop - 1) // self.n + 1)
        return np.concatenate(
            [self._part(epoch, max(start - epoch * self.n, 0), min(stop - epoch * self.n, self.n)) for epoch in epochs]
        )

    def _part(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` … ``stop`` − 1 of the permutation of an epoch."""
        if self.n <= LARGEST_PERMUTATION:
            return self._permutation(epoch)[start:stop]
        keys = generator(self.seed, self.stream, epoch).integers(2**64, size=ROUNDS, dtype=np.uint64)
        return shuffled(np.arange(start, stop), self.n, keys)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._recent:
            while len(self._recent) > 1:  # a batch that straddles two epochs needs two
                del self._recent[next(iter(self._recent))]
            self._recent[epoch] = generator(self.seed, self.stream, epoch).permutation(self.n)
        return self._recent[epoch]
