# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from ssmkernels.data.philox import philox4x32, uniforms

# Of Random123, the authors' code: tests/kat_vectors, "philox4x32 10".
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    counters = np.array([words(counter)] * 2, dtype=np.uint64).T
    assert philox4x32(counters, tuple(words(key))).T.tolist() == [words(result)] * 2


def test_a_number_depends_on_its_place_alone():
    positions = np.array([7, 0, 2**32 - 1, 3])
    numbers = uniforms(2**64 - 1, 5, 2**63, positions, 11)
    assert numbers.shape == (4, 11)
    for place, position in enumerate(positions):
        alone = uniforms(2**64 - 1, 5, 2**63, np.array([position]), 3)
        assert np.array_equal(alone[0], numbers[place, :3])


def test_places_share_no_numbers():
    """Neighbours in every argument, and in both words of the long ones."""
    places = [
        (seed, stream, step) for seed in (0, 1, 2**32, 2**63) for stream in (0, 1, 2**16 - 1) for step in (0, 1, 2**32)
    ]
    numbers = np.concatenate([uniforms(*place, np.arange(5), 9).ravel() for place in places])
    # 1,620 numbers of 32 bits: 3e-4 pairs are equal by chance.
    assert len(np.unique(numbers)) == len(numbers)


def test_numbers_are_uniform_and_uncorrelated():
    n = 20_000
    numbers = uniforms(1, 2, 3, np.arange(n), 6)
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        # Kolmogorov-Smirnov: exceeded with probability 2 exp(−2 · 2.3²) = 5e-5.
        ranks = np.arange(1, n + 1) / n
        assert np.abs(np.sort(column) - ranks).max() < 2.3 / np.sqrt(n)
    together = np.corrcoef(numbers.T) - np.eye(6)
    along = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in numbers.T]
    assert max(np.abs(together).max(), np.abs(along).max()) < 5 / np.sqrt(n), "five standard deviations"


def test_no_numbers():
    assert uniforms(0, 0, 0, np.arange(3), 0).shape == (3, 0)
    assert uniforms(0, 0, 0, np.arange(0), 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, np.arange(2), 1), "seed is -1; it should be in"),
        ((2**64, 0, 0, np.arange(2), 1), "seed is 18446744073709551616"),
        ((0, 2**16, 0, np.arange(2), 1), "stream is 65536"),
        ((0, 0, -1, np.arange(2), 1), "step is -1"),
        ((0, 0, 0, np.arange(2), -1), "count is -1; it should be in"),
        ((0, 0, 0, np.array([-1]), 1), r"positions are in \[-1, -1\]"),
        ((0, 0, 0, np.array([2**32]), 1), "positions are in"),
        ((0, 0, 0, np.array([0.5]), 1), "positions is float64 of shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniforms(*arguments)
