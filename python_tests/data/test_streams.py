# SPDX-License-Identifier: BSD-3-Clause
import itertools

import numpy as np
import pytest

from ssmkernels.data import IndexStream, Stream, generator


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
