# SPDX-License-Identifier: BSD-3-Clause
import itertools

import numpy as np
import pytest

from ssmkernels.data import IndexStream, Stream, generator, streams


def test_generators_of_different_places_differ():
    places = list(itertools.product((0, 1), (0, 1), (0, 1), (0, 1)))
    draws = {place: tuple(generator(*place).integers(2**63, size=8)) for place in places}
    values = [value for place in places for value in draws[place]]
    assert len(set(values)) == len(values)
    assert all(tuple(generator(*place).integers(2**63, size=8)) == draws[place] for place in places)


def test_neighbouring_places_are_uncorrelated():
    draws = np.array([generator(0, Stream.LABELED_WEAK, step, 0).random(64) for step in range(200)])
    assert np.abs(np.corrcoef(draws)[np.triu_indices(200, 1)]).max() < 0.65
    assert draws.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("n", "batch_size"), [(50, 8), (7, 20), (64, 64), (1, 3)])
def test_every_epoch_holds_every_index_once(n, batch_size):
    steps = 6 * n // batch_size + 1
    stream = IndexStream(n, seed=3)
    indices = np.concatenate([stream.batch(step, batch_size) for step in range(steps)])
    assert len(indices) == steps * batch_size
    for epoch in range(len(indices) // n):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_does_not_depend_on_the_batches_before():
    stream = IndexStream(37, seed=5)
    batches = [stream.batch(step, 10) for step in range(30)]
    for step in (29, 3, 17, 0, 18, 29):
        assert np.array_equal(stream.batch(step, 10), batches[step])
        assert np.array_equal(IndexStream(37, seed=5).batch(step, 10), batches[step])


@pytest.fixture
def without_permutations(monkeypatch):
    monkeypatch.setattr(streams, "LARGEST_PERMUTATION", 0)


@pytest.mark.usefixtures("without_permutations")
class TestBijection:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 64, 1000, 4097])
    def test_every_epoch_holds_every_index_once(self, n):
        stream = IndexStream(n, seed=3)
        for epoch in range(3):
            assert sorted(stream.batch(epoch, n)) == list(range(n))

    @pytest.mark.parametrize("n", [37, 1000])
    def test_a_batch_is_a_part_of_its_epochs(self, n):
        stream = IndexStream(n, seed=5)
        epochs = np.concatenate([stream.batch(epoch, n) for epoch in range(3)])
        for step in range(3 * n // 10):
            assert np.array_equal(IndexStream(n, seed=5).batch(step, 10), epochs[10 * step : 10 * step + 10])

    def test_epochs_seeds_and_streams_differ(self):
        first = IndexStream(100, seed=1).batch(0, 100)
        others = [IndexStream(100, seed=1).batch(1, 100), IndexStream(100, seed=2).batch(0, 100)]
        others.append(IndexStream(100, seed=1, stream=Stream.UNLABELED_ORDER).batch(0, 100))
        assert not any(np.array_equal(first, other) for other in others)

    def test_places_and_pairs_of_neighbours_are_uniform(self):
        """Of 2,000 epochs: where index 0 stands, and how far apart 0 and 1 stand, by the χ² of 12 places."""
        n, epochs = 13, 2000
        stream = IndexStream(n, seed=7)
        orders = np.stack([stream.batch(epoch, n) for epoch in range(epochs)])
        first, second = (orders == 0).argmax(axis=1), (orders == 1).argmax(axis=1)
        for places, kinds in ((first, n), ((second - first) % n - 1, n - 1)):
            counts = np.bincount(places, minlength=kinds)
            expected = epochs / kinds
            # 6 standard deviations of χ² with as many degrees of freedom
            assert ((counts - expected) ** 2 / expected).sum() < kinds + 6 * (2 * kinds) ** 0.5


def test_large_sets_have_no_permutation():
    stream = IndexStream(10**12, seed=0)
    batches = np.concatenate([stream.batch(step, 100) for step in (0, 1, 10**9, 10**10)])
    assert len(set(batches.tolist())) > 395
    assert batches.min() >= 0
    assert batches.max() < 10**12
    assert stream._recent == {}


@pytest.mark.parametrize("left_out", [[], [0], [9], [0, 1, 2], [3, 5, 6, 9], list(range(9))])
def test_what_remains(left_out):
    kept = np.setdiff1d(np.arange(10), left_out)
    assert np.array_equal(streams.remaining(np.arange(len(kept)), np.array(left_out, dtype=np.int64)), kept)


def test_epochs_seeds_and_streams_differ():
    first = IndexStream(100, seed=1).batch(0, 100)
    others = [IndexStream(100, seed=1).batch(1, 100), IndexStream(100, seed=2).batch(0, 100)]
    others.append(IndexStream(100, seed=1, stream=Stream.UNLABELED_ORDER).batch(0, 100))
    assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IndexStream(0, 1), "n is 0"),
        (lambda: IndexStream(5, 1).batch(-1, 2), "step is -1"),
        (lambda: IndexStream(5, 1).batch(0, 0), "batch_size is 0"),
        (lambda: generator(-1, 0), r"seed is -1; it should be in \[0, 2\^64\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
