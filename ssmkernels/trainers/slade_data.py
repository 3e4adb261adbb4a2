# SPDX-License-Identifier: BSD-3-Clause
"""The images of SLADE: labelled and unlabelled ones, and those to validate and to test on, by Musgrave's protocol
(ECCV 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from ssmkernels import data

EVALUATION_SCALE = 256 / 227
"""Shorter side of an evaluated photograph over that of the crop from its centre: Musgrave's."""
CROP_SCALE = (0.16, 1.0)
"""Share of a photograph that a training crop covers: Musgrave's."""

UnlabeledClasses = Literal["training", "test"]


@dataclass
class SladeDataConfig:
    """Which images, labelled and unlabelled, and how their classes are split."""

    name: str = "digits"
    """Labelled collection, as :func:`ssmkernels.data.load_collection` knows it."""
    root: str | None = None
    """Folder or file of its images; none for those that come inside packages."""
    unlabeled_name: str | None = None
    """Collection of the unlabelled images, all of it. With none, some images of the labelled one are taken."""
    unlabeled_root: str | None = None
    """Folder or file of its images."""
    unlabeled_classes: UnlabeledClasses = "training"
    """Where there is no unlabelled collection: "training" takes the labels off some of the training classes; "test" has
    half of the images of the test classes, drawn by the seed and not tested on, as images without labels. The latter is
    the situation of CUB-200 and NABirds, which has the species that are tested on.
    """
    labeled_fraction: float = 0.5
    """Of the training classes, drawn by the seed, to keep their labels where some lose them."""
    image_size: int | None = None
    """Side of the images that the network sees, in pixels; none for the labelled collection's own."""
    test_fraction: float = 0.5
    """Of the classes, the last ones, to test on."""
    folds: int = 4
    """Class-disjoint folds of the other classes."""
    fold: int | None = 0
    """The one to validate on, from 0, with the others to train on. None trains a network for each fold and tests their
    embeddings side by side.
    """

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"data.folds is {self.folds}; it should be at least 2")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise ValueError(
                f"data.fold is {self.fold}; it should be in [0, {self.folds}), one of data.folds, or null for all"
            )
        if self.unlabeled_classes not in get_args(UnlabeledClasses):
            raise ValueError(
                f"data.unlabeled_classes is {self.unlabeled_classes!r}; it should be one of"
                f" {', '.join(get_args(UnlabeledClasses))}"
            )
        for name in ("labeled_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it should be between 0 and 1")
        if self.unlabeled_name is None and self.unlabeled_root is not None:
            raise ValueError(
                f"data.unlabeled_root is {self.unlabeled_root!r} without data.unlabeled_name; it should have one"
            )


class SladeImages(NamedTuple):
    """The images of a run: of disjoint classes but for the unlabelled ones, and no image twice."""

    labeled: data.ImageCollection
    unlabeled: data.ImageCollection | None
    validation: data.ImageCollection
    test: data.ImageCollection


def load_images(
    config: SladeDataConfig, *, unlabeled: bool = True
) -> tuple[data.ImageCollection, data.ImageCollection | None]:
    """The labelled collection and the ``unlabeled`` one, where there is one and it is wanted."""
    images = data.load_collection(config.name, config.root)
    if config.unlabeled_name is None or not unlabeled:
        return images, None
    return images, data.load_collection(config.unlabeled_name, config.unlabeled_root)


def held_out_classes(config: SladeDataConfig, num_classes: int) -> np.ndarray:
    """The last classes, ``test_fraction`` of them, rounded up."""
    num_test = math.ceil(num_classes * config.test_fraction - 1e-9)
    if num_classes - num_test <= config.folds or num_test < 2:
        raise ValueError(
            f"data.test_fraction is {config.test_fraction}, which splits {num_classes} classes into"
            f" {num_classes - num_test} and {num_test}; it should leave more than {config.folds}, data.folds, to train"
            " and validate on and at least 2 to test on"
        )
    return np.arange(num_classes - num_test, num_classes)


def split_images(
    config: SladeDataConfig, images: data.ImageCollection, unlabeled_images: data.ImageCollection | None, *, seed: int
) -> SladeImages:
    """The last classes of ``images`` test, those of a fold of the others validate, the rest is to train on.

    Args:
        unlabeled_images: the collection ``config.unlabeled_name``. Where there is no such name,
            ``config.unlabeled_classes`` says which of ``images`` are taken instead.
        seed: of the draw of those.
    """
    if config.fold is None:
        raise ValueError("data.fold is None; it should be the number of a fold")
    test = held_out_classes(config, images.num_classes)
    validation = data.split_folds(test[0], config.folds)[config.fold]
    labeled = np.setdiff1d(np.arange(test[0]), validation)
    tested, untested = tested_images(config, images, seed=seed)
    if unlabeled_images is None and config.unlabeled_name is None:
        if untested is not None:
            unlabeled_images = untested
        else:
            labeled, without = _without_labels(config, labeled, seed)
            unlabeled_images = data.class_subset(images, without)
    return SladeImages(
        data.class_subset(images, labeled), unlabeled_images, data.class_subset(images, validation), tested
    )


def tested_images(
    config: SladeDataConfig, images: data.ImageCollection, *, seed: int
) -> tuple[data.ImageCollection, data.ImageCollection | None]:
    """The images of the test classes that are tested on, and the others of these classes where those are the
    unlabelled ones.
    """
    held_out = data.class_subset(images, held_out_classes(config, images.num_classes))
    if config.unlabeled_name is not None or config.unlabeled_classes == "training":
        return held_out, None
    return _halves_of_classes(held_out, seed)


def _without_labels(config: SladeDataConfig, classes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes that keep their labels, and those that lose them."""
    num_labeled = round(config.labeled_fraction * len(classes))
    if not 2 <= num_labeled < len(classes):
        raise ValueError(
            f"data.labeled_fraction is {config.labeled_fraction}, {num_labeled} of {len(classes)} training classes; "
            "it should leave at least 2 with labels and 1 without"
        )
    order = data.generator(seed, data.Stream.CLASSES).permutation(classes)
    return np.sort(order[:num_labeled]), np.sort(order[num_labeled:])


def _halves_of_classes(images: data.ImageCollection, seed: int) -> tuple[data.ImageCollection, data.ImageCollection]:
    """Half of the images of every class, and the others."""
    order = data.generator(seed, data.Stream.CLASSES).permutation(len(images))
    by_class = order[np.argsort(images.labels[order], kind="stable")]
    parts = [np.sort(by_class[first::2]) for first in (0, 1)]
    first, second = (
        replace(images, images=data.ImageSubset(images.images, part, images.labels[part], images.num_classes))
        for part in parts
    )
    return first, second


def make_views(config: SladeDataConfig, images: data.ImageCollection, normalization: str) -> data.RetrievalViews:
    """Views of ``images`` at the size of the run, Musgrave's crops where they are photographs."""
    size = images.image_size if config.image_size is None else config.image_size
    return data.retrieval_views(
        images, normalization, size=size, resize=round(size * EVALUATION_SCALE), crop_scale=CROP_SCALE
    )
