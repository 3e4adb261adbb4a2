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


class IndexStream:
    """Endless shuffled epochs of 0 … n−1: position p of the stream is element p mod n of the permutation of epoch ⌊p /
    n⌋.

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
            [self._permutation(epoch)[max(start - epoch * self.n, 0) : stop - epoch * self.n] for epoch in epochs]
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._recent:
            while len(self._recent) > 1:  # a batch that straddles two epochs needs two
                del self._recent[next(iter(self._recent))]
            self._recent[epoch] = generator(self.seed, self.stream, epoch).permutation(self.n)
        return self._recent[epoch]
