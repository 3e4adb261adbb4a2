# SPDX-License-Identifier: BSD-3-Clause
"""Which images keep their labels."""

from __future__ import annotations

import numpy as np

from ssmkernels.data.streams import Stream, generator


def split_labels(labels: np.ndarray, num_labeled: int, *, seed: int, proportional: bool = False) -> np.ndarray:
    """The sorted indices [num_labeled] (int64) of the images that keep their labels, drawn per class after a seeded
    shuffle.

    A split with more labels of the same seed contains the one with fewer.

    Args:
        labels: [N] classes 0 … L−1, each with at least one image; images of −1, whose class is not known, get none.
        num_labeled: how many to draw.
        seed: seed of the shuffle.
        proportional: draw in proportion to the sizes of the classes, at least one of each, instead of equally many of
            each.

    Raises:
        ValueError: ``num_labeled`` is below L or above N; or, without ``proportional``, is no multiple of L or takes
            more than a class has.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise ValueError(f"labels is {labels.dtype} of shape {labels.shape}; it should be integers of shape [N], N > 0")
    if labels.min() < -1:
        raise ValueError(f"labels has a {labels.min()}; classes should be numbered from 0, or -1 where none is known")
    known = np.flatnonzero(labels >= 0)
    if len(known) == 0:
        raise ValueError("labels has no image of a known class; it should have at least one")
    labels = labels[known]
    sizes = np.bincount(labels)
    classes = len(sizes)
    if (sizes == 0).any():
        raise ValueError(
            f"labels has no image of class {int(sizes.argmin())}; every class up to {classes - 1} should have one"
        )
    if not classes <= num_labeled <= len(labels):
        raise ValueError(
            f"num_labeled is {num_labeled}; it should be at least {classes}, the classes, and at most {len(labels)},"
            " the images of a known class"
        )
    per_class = num_labeled // classes
    if not proportional and num_labeled % classes:
        raise ValueError(
            f"num_labeled is {num_labeled}; it should be a multiple of {classes}, the classes, unless proportional"
        )
    if not proportional and per_class > sizes.min():
        raise ValueError(
            f"num_labeled is {num_labeled}, {per_class} of each class; class {int(sizes.argmin())} has only"
            f" {sizes.min()} images"
        )

    shuffled = generator(seed, Stream.SPLIT).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of each image in its class
    # Labels are handed out in this order: one round of the classes after another, or by the Huntington-Hill method of
    # apportionment.
    turn = np.sqrt(rank * (rank + 1)) / np.repeat(sizes, sizes) if proportional else rank
    return known[np.sort(by_class[np.argsort(turn, kind="stable")[:num_labeled]])]
