# SPDX-License-Identifier: BSD-3-Clause
import numpy as np
import pytest

from ssmkernels.data import halves, split_folds


@pytest.mark.parametrize(("classes", "first"), [(200, 100), (196, 98), (17, 8), (2, 1)])
def test_halves(classes, first):
    trainval, test = halves(classes)
    assert trainval.tolist() == list(range(first))
    assert test.tolist() == list(range(first, classes))
    assert trainval.dtype == test.dtype == np.int64


@pytest.mark.parametrize(
    ("classes", "folds", "sizes"), [(100, 4, [25] * 4), (98, 4, [25, 25, 24, 24]), (8, 2, [4, 4]), (4, 4, [1] * 4)]
)
def test_folds_part_the_classes_in_order(classes, folds, sizes):
    parts = split_folds(classes, folds)
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == list(range(classes))
    assert all(part.dtype == np.int64 for part in parts)


def test_four_folds_are_the_protocol():
    assert len(split_folds(100)) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: halves(1), "num_classes is 1; it should be at least 2"),
        (lambda: split_folds(10, 1), "folds is 1; it should be at least 2"),
        (lambda: split_folds(3), "num_classes is 3; it should be at least 4"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
