# SPDX-License-Identifier: BSD-3-Clause
"""The images of SLADE: labelled and unlabelled ones, and those to validate and to test on, by Musgrave's protocol (ECCV
2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from ssmkernels import data, models
from ssmkernels.trainers import kept
from ssmkernels.trainers.base import evaluation_loader, training_loader
from ssmkernels.trainers.loop import Fabric
from ssmkernels.trainers.slade_config import SladeConfig, SladeDataConfig

EVALUATION_SCALE = 256 / 227
"""Shorter side of an evaluated photograph over that of the crop from its centre: Musgrave's."""
CROP_SCALE = (0.16, 1.0)
"""Share of a photograph that a training crop covers: Musgrave's."""


class SladeImages:
    """The images of a run, of disjoint classes but for the unlabelled ones, no image twice; their views and batches.

    The last classes of ``images`` test, those of a fold of the others validate, the rest is to train on.

    Args:
        config: the settings.
        images: the labelled collection.
        unlabeled_images: the collection ``config.data.unlabeled_name``. Where there is no such name,
            ``config.data.unlabeled_classes`` says which of ``images`` are taken instead.
        native: whether views have a collection's own mean and deviation instead of those of ``config.model``.
        kept_before: the folder of another run whose list of classes this one begins with.

    Attributes:
        labeled, unlabeled, validation, test: collections; ``unlabeled`` is None where it was not given and is not a
            part of ``images``.
    """

    def __init__(
        self,
        config: SladeConfig,
        images: data.ImageCollection,
        unlabeled_images: data.ImageCollection | None = None,
        *,
        native: bool = False,
        kept_before: Path | None = None,
    ) -> None:
        self.config, chosen = config, config.data
        self.normalization = "native" if native else models.preprocessing(config.model)
        labeled, validation, tested = _split(config, images, kept_before)
        self.test = data.class_subset(images, tested)
        self.unlabeled = unlabeled_images
        if chosen.unlabeled_name is None and chosen.unlabeled_classes == "test":
            self.test, untested = _halves_of_classes(self.test, config.seed)
            self.unlabeled = untested if unlabeled_images is None else unlabeled_images
        elif chosen.unlabeled_name is None and unlabeled_images is None:
            labeled, without = _without_labels(chosen, labeled, config.seed)
            self.unlabeled = data.class_subset(images, without)
        self.labeled = data.class_subset(images, labeled)
        self.validation = data.class_subset(images, validation)

    def views(self, images: data.ImageCollection) -> data.RetrievalViews:
        """Views of some images at the size of the run, Musgrave's crops where they are photographs."""
        size = self.config.data.image_size or images.image_size
        return data.retrieval_views(
            images,
            self.normalization,
            size=size,
            resize=round(size * EVALUATION_SCALE),
            crop_scale=CROP_SCALE,
            batched=self.config.data.augment == "batched",
        )

    def seen(self, images: data.ImageCollection) -> data.SeenImages:
        """How the network sees them when it is evaluated."""
        size = self.config.data.image_size or images.image_size
        return data.SeenImages.of(*self.views(images)[1:], size=size)

    def training_batches(
        self, images: data.ImageCollection, labels: Tensor, fabric: Fabric, *, start_step: int, end: int, stream: int
    ) -> Iterable[data.CollectionBatch]:
        """``per_class`` images of each of some classes, for every step from ``start_step`` to ``end``."""
        config, views = self.config, self.views(images)
        batches = data.PKBatches(
            images.images,
            np.arange(len(images)),
            labels.cpu().numpy(),
            transform=views.training,
            batch_size=config.batch_size,
            per_class=config.per_class,
            seed=config.seed,
            start_step=min(start_step, end),
            num_steps=end,
            stream=stream,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            mean=views.mean,
            std=views.std,
        )
        return training_loader(batches, fabric, config.run)

    def evaluation_batches(self, images: data.ImageCollection, fabric: Fabric) -> Iterable[tuple[Tensor, Tensor]]:
        """This rank's share of some images once, with their labels."""
        return evaluation_loader(images.images, fabric, self.config.run, self.views(images))


def load_images(
    config: SladeDataConfig, *, unlabeled: bool = True
) -> tuple[data.ImageCollection, data.ImageCollection | None]:
    """The labelled collection and the ``unlabeled`` one, where there is one and it is wanted."""
    images = data.load_collection(config.name, config.root)
    if config.unlabeled_name is None or not unlabeled:
        return images, None
    return images, data.load_collection(config.unlabeled_name, config.unlabeled_root)


def _split(
    config: SladeConfig, images: data.ImageCollection, kept_before: Path | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes to train, validate and test on: of a list, or the last ones to test on; and of the others a fold."""
    chosen = config.data
    if chosen.fold is None:
        raise ValueError("data.fold is None; it should be the number of a fold")
    if chosen.classes_file is None:
        others = np.arange(_classes_to_train(chosen, images.num_classes))
        tested = np.arange(len(others), images.num_classes)
    else:
        others, validation, tested = kept.read_classes(config, images.class_names, kept_before)
        if len(validation):
            return others, validation, tested
        if len(others) <= chosen.folds:
            raise ValueError(
                f"{chosen.classes_file} has {len(others)} classes to train on; without any to validate on it should"
                f" have more than {chosen.folds}, data.folds"
            )
    validation = others[data.split_folds(len(others), chosen.folds)[chosen.fold]]
    return np.setdiff1d(others, validation), validation, tested


def _classes_to_train(config: SladeDataConfig, num_classes: int) -> int:
    """All but the last classes, of which there are ``test_fraction``, rounded up."""
    num_test = math.ceil(num_classes * config.test_fraction - 1e-9)
    if num_classes - num_test <= config.folds or num_test < 2:
        raise ValueError(
            f"data.test_fraction is {config.test_fraction}, which splits {num_classes} classes into"
            f" {num_classes - num_test} and {num_test}; it should leave more than {config.folds}, data.folds, to train"
            " and validate on and at least 2 to test on"
        )
    return num_classes - num_test


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
    return data.take(images, parts[0]), data.take(images, parts[1])
