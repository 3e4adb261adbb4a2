# SPDX-License-Identifier: BSD-3-Clause
"""Several image collections as one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from PIL import Image

from ssmkernels.data.images import ImageDataset, file_of
from ssmkernels.data.retrieval import ImageCollection


class ImageUnion:
    """The images of several data sets, one after another; the classes of each are numbered on from those of the one
    before.

    Args:
        datasets: at least one.
    """

    def __init__(self, *datasets: ImageDataset) -> None:
        if not datasets:
            raise ValueError("datasets is empty; it should have at least one")
        self.datasets = datasets
        self._starts = np.cumsum([0, *map(len, datasets)])
        first_class = np.cumsum([0, *(dataset.num_classes for dataset in datasets)])
        self.labels = np.concatenate(
            [dataset.labels + first for dataset, first in zip(datasets, first_class, strict=False)]
        )
        self.num_classes = int(first_class[-1])

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        dataset, place = self._place(index)
        return dataset.image(place)

    def path(self, index: int) -> str | None:
        return file_of(*self._place(index))

    def _place(self, index: int) -> tuple[ImageDataset, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.datasets[which], int(index - self._starts[which])


def unite(first: ImageCollection, *others: ImageCollection) -> ImageCollection:
    """The images of all collections, seen as ``first`` is; none of their classes is taken for one of another's.

    Raises:
        ValueError: the images of some are no photographs and those of others are, or they differ in size or channels.
    """
    for other in others:
        for name in ("augmentation", "channels") + (
            () if first.augmentation.startswith("imagenet") else ("image_size",)
        ):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"others has a collection with {name} {getattr(other, name)!r}; it should be"
                    f" {getattr(first, name)!r}, as in the first"
                )
    every = (first, *others)
    return replace(
        first,
        images=ImageUnion(*(collection.images for collection in every)),
        class_names=tuple(itertools.chain.from_iterable(collection.class_names for collection in every)),
        queries=None,
    )
