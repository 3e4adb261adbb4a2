# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from ssmkernels.data import split_labels

LABELS = np.repeat(np.arange(5), [40, 30, 10, 80, 20])[np.random.default_rng(0).permutation(180)]


def test_equal_counts():
    index = split_labels(LABELS, 25, seed=1)
    assert index.dtype == np.int64
    assert np.bincount(LABELS[index]).tolist() == [5] * 5
    assert (np.diff(index) > 0).all()


def test_proportional_counts():
    assert np.bincount(LABELS[split_labels(LABELS, 18, seed=1, proportional=True)]).tolist() == [4, 3, 1, 8, 2]
    assert np.bincount(LABELS[split_labels(LABELS, 5, seed=1, proportional=True)]).tolist() == [1] * 5, (
        "every class has a label"
    )
    for count in range(5, 181):
        counts = np.bincount(LABELS[split_labels(LABELS, count, seed=1, proportional=True)])
        assert counts.sum() == count
        assert (np.abs(counts - count * np.bincount(LABELS) / 180) < 1.5)[counts > 1].all()
    assert split_labels(LABELS, 180, seed=1, proportional=True).tolist() == list(range(180))


def test_proportional_is_equal_where_the_classes_are():
    labels = np.arange(60) % 6
    assert np.array_equal(split_labels(labels, 24, seed=2), split_labels(labels, 24, seed=2, proportional=True))


def test_seeded():
    assert np.array_equal(split_labels(LABELS, 25, seed=1), split_labels(LABELS, 25, seed=1))
    assert not np.array_equal(split_labels(LABELS, 25, seed=1), split_labels(LABELS, 25, seed=2))


@pytest.mark.parametrize("proportional", [False, True])
def test_more_labels_contain_the_fewer(proportional):
    fewer, more = (split_labels(LABELS, count, seed=4, proportional=proportional) for count in (15, 45))
    assert set(fewer) < set(more)


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        (LABELS, 12, "num_labeled is 12; it should be a multiple of 5, the classes, unless proportional"),
        (LABELS, 4, "num_labeled is 4; it should be at least 5, the classes, and at most 180, the images"),
        (LABELS, 181, "num_labeled is 181; it should be at least 5, the classes, and at most 180"),
        (LABELS, 55, "num_labeled is 55, 11 of each class; class 2 has only 10 images"),
        (LABELS * 2, 18, "labels has no image of class 1"),
        (LABELS - 2, 20, "labels has a -2"),
        (LABELS * 0 - 1, 20, "labels has no image of a known class"),
        (LABELS.astype(float), 20, "labels is float64"),
        (LABELS[None], 20, r"labels is int64 of shape \(1, 180\)"),
        (LABELS[:0], 20, r"shape \(0,\)"),
    ],
)
def test_bad_arguments(labels, count, message):
    with pytest.raises(ValueError, match=message):
        split_labels(labels, count, seed=0)
