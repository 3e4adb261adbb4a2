# SPDX-License-Identifier: BSD-3-Clause
"""Random numbers of a whole batch at once, by a counter-based generator: Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011).

NumPy's generators are made for one place of a run at a time (:func:`ssmkernels.data.generator`), 20 µs each; here the
places are the counter, so the numbers of 960 views are a few hundred operations on arrays.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """The four words of Philox4x32-10 at each counter.

    Args:
        counter: [4, n] uint64, words in [0, 2^32).
        key: two words.
    """
    c0, c1, c2, c3 = counter
    for number in range(_ROUNDS):
        k0, k1 = (
            np.uint64((word + number * increment) % 2**32) for word, increment in zip(key, _KEY_INCREMENTS, strict=True)
        )
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product_2 >> _HALF) ^ c1 ^ k0, product_2 & _LOW
        c2, c3 = (product_0 >> _HALF) ^ c3 ^ k1, product_0 & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, stream: int, step: int, positions: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers for each of n places of a step, float64 [n, count], multiples of 2^−32 in [0, 1).

    Row i depends on (seed, stream, step, positions[i]) alone: not on the other positions, nor on ``count``. Two places
    never share a number: the seed is the key, and step, position, stream and the block of four numbers are the counter.

    Args:
        seed, step: in [0, 2^64).
        stream: in [0, 2^16), see :class:`ssmkernels.data.Stream`.
        positions: [n] integers in [0, 2^32).
        count: in [0, 2^18].
    """
    for name, value, limit in (("seed", seed, 2**64), ("step", step, 2**64), ("stream", stream, 2**16)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}; it should be in [0, {limit})")
    if not 0 <= count <= 2**18:
        raise ValueError(f"count is {count}; it should be in [0, 2^18]")
    positions = np.asarray(positions)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise ValueError(f"positions is {positions.dtype} of shape {positions.shape}; it should be integers [n]")
    if len(positions) and not 0 <= positions.min() <= positions.max() < 2**32:
        raise ValueError(f"positions are in [{positions.min()}, {positions.max()}]; they should be in [0, 2^32)")
    blocks = -(-count // 4)
    counter = np.empty((4, len(positions), blocks), dtype=np.uint64)
    counter[0] = (stream << 16) + np.arange(blocks, dtype=np.uint64)
    counter[1] = positions.astype(np.uint64)[:, None]
    counter[2], counter[3] = step % 2**32, step >> 32
    words = philox4x32(counter.reshape(4, -1), (seed % 2**32, seed >> 32)).reshape(counter.shape)
    return words.transpose(1, 2, 0).reshape(len(positions), 4 * blocks)[:, :count] * 2.0**-32
