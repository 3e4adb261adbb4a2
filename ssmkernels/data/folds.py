# SPDX-License-Identifier: BSD-3-Clause
"""Class splits of the retrieval protocol of Musgrave et al. (A Metric Learning Reality Check, ECCV 2020), section 3."""

from __future__ import annotations

import numpy as np


def halves(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first half of the classes, to train and validate on, and the rest, to test on: two int64 arrays.

    Args:
        num_classes: number of classes L, at least 2. With an odd one the first half is the smaller.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it should be at least 2")
    first, second = np.split(np.arange(num_classes), [num_classes // 2])
    return first, second


def split_folds(num_classes: int, folds: int = 4) -> list[np.ndarray]:
    """Disjoint runs of consecutive classes for cross-validation: int64 arrays whose sizes differ by one at most, the
    larger ones first.

    The f-th model of the protocol is validated on the f-th run and trained on all others. To cut a training half into
    folds, take its collection, ``class_subset(collection, halves(L)[0])``, whose classes count from 0.

    Args:
        num_classes: classes to train and validate on.
        folds: number of runs, at least 2.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}; it should be at least 2")
    if num_classes < folds:
        raise ValueError(f"num_classes is {num_classes}; it should be at least {folds}, one class for each of folds")
    return np.array_split(np.arange(num_classes), folds)
