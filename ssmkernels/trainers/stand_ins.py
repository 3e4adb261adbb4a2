# SPDX-License-Identifier: BSD-3-Clause
"""Trainers without their images: as many of them, of that size and of as many classes, all black and taking no memory.

A step of such a trainer takes the memory that one of the real images takes, see
:mod:`ssmkernels.trainers.step_memory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkernels import data
from ssmkernels.trainers.base import Trainer
from ssmkernels.trainers.classifier import ClassifierTrainer
from ssmkernels.trainers.loop import Fabric
from ssmkernels.trainers.mixed_lp import MixedLP
from ssmkernels.trainers.mlsn import MLSN
from ssmkernels.trainers.simmatch import SimMatch
from ssmkernels.trainers.slade import Slade, SladeBatch
from ssmkernels.trainers.swav import SwAV


class Size(NamedTuple):
    """Of a data set: its training images, or all of a collection's."""

    images: int
    classes: int
    side: int = 224
    """Pixels."""
    channels: int = 3


SIZES = {
    "aircraft-family": Size(10_000, 70),
    "aircraft-manufacturer": Size(10_000, 30),
    "aircraft-variant": Size(10_000, 100),
    "cars196": Size(16_185, 196),
    "cifar10": Size(50_000, 10, 32),
    "cifar100": Size(50_000, 100, 32),
    "compcars": Size(136_726, 1716),
    "cub200": Size(11_788, 200),
    "digits": Size(1198, 10, 8, 1),
    "dogs": Size(20_580, 120),
    "fashion200k": Size(201_838, 200),
    "imagenet": Size(1_281_167, 1000),
    "inshop": Size(52_712, 7982),
    "mnist5k": Size(4000, 10, 28, 1),
    "nabirds": Size(48_562, 555),
    "pets": Size(7390, 37),
    "sop": Size(120_053, 22_634),
    "stl10": Size(105_000, 10, 96),
    "svhn": Size(73_257, 10, 32),
    "svhn-extra": Size(604_388, 10, 32),
}
"""What is published; of data sets that come inside packages what their readers give."""
PHOTOGRAPH = 100
"""Pixels from which images are photographs, whose crops are the views; smaller ones are shifted."""


def stand_in(method: str, config: Any, fabric: Fabric) -> Trainer:
    """The trainer of a ``method`` of ``ssmkernels train``.

    Raises:
        ValueError, OSError, ImportError: the data set is not in :data:`SIZES` and cannot be read, the network cannot be
            built, or the settings do not fit the images.
    """
    return _TRAINERS[method](config, fabric)


def size_of(name: str, root: str | None, *, collection: bool = False) -> Size:
    """The size of a data set: as published, or as it lies in ``root``."""
    if name in SIZES:
        return SIZES[name]
    if collection:
        images = data.load_collection(name, root)
        return Size(len(images), images.num_classes, images.image_size, images.channels)
    splits = data.load_dataset(name, root)
    return Size(len(splits.train), splits.num_classes, splits.image_size, splits.channels)


def black_images(size: Size) -> data.ArrayImages:
    """One black pixel, seen as all of them."""
    shape = (size.images, size.side, size.side, size.channels)[: 3 if size.channels == 1 else 4]
    return data.ArrayImages(np.broadcast_to(np.uint8(0), shape), np.arange(size.images) % size.classes, size.classes)


def _splits(chosen: Any) -> data.ImageSplits:
    size = size_of(chosen.name, chosen.root)
    images, names = black_images(size), tuple(map(str, range(size.classes)))
    middle = (0.5,) * size.channels
    kind: Literal["imagenet", "crop-flip"] = "imagenet" if size.side > PHOTOGRAPH else "crop-flip"
    return data.ImageSplits(images, images, size.classes, names, middle, middle, size.side, kind)


def _collection(name: str, root: str | None) -> data.ImageCollection:
    size = size_of(name, root, collection=True)
    middle, names = (0.5,) * size.channels, tuple(map(str, range(size.classes)))
    kind: Literal["imagenet", "crop-flip"] = "imagenet" if size.side > PHOTOGRAPH else "crop-flip"
    return data.ImageCollection(black_images(size), names, middle, middle, size.side, kind)


def _simmatch(config: Any, fabric: Fabric) -> Trainer:
    return SimMatch(config, _splits(config.data), fabric)


def _mlsn(config: Any, fabric: Fabric) -> Trainer:
    return MLSN(config, _splits(config.data), fabric)


def _mixed_lp(config: Any, fabric: Fabric) -> Trainer:
    return MixedLP(config, _collection(config.data.name, config.data.root), fabric)


def _swav(config: Any, fabric: Fabric) -> Trainer:
    images = _collection(config.data.name, config.data.root)
    return SwAV(config, images, images, fabric)


def _slade(config: Any, fabric: Fabric) -> Trainer:
    chosen = config.data
    others = None if chosen.unlabeled_name is None else _collection(chosen.unlabeled_name, chosen.unlabeled_root)
    return Slade(config, _collection(chosen.name, chosen.root), fabric, unlabeled_images=others)


_TRAINERS: dict[str, Callable[[Any, Fabric], Trainer]] = {
    "mixed-lp": _mixed_lp,
    "mlsn": _mlsn,
    "simmatch": _simmatch,
    "slade": _slade,
    "swav": _swav,
}


def batch_of(trainer: Trainer) -> Any:
    """A batch of a trainer's step: views of zeros, float32, and labels, positions and slots 0."""
    config = trainer.config
    rows = config.batch_size
    if isinstance(trainer, ClassifierTrainer):
        per_labeled = getattr(config, "mu", 1) if config.uses_unlabeled else 0
        labeled, weak, strong = (_views(trainer, count) for count in (rows, per_labeled * rows, per_labeled * rows))
        return data.Batch(labeled, _zeros(rows), _zeros(rows), weak, strong, _zeros(per_labeled * rows))
    if isinstance(trainer, SwAV):
        small = _views(trainer, rows * config.small_crops, _side_of_small_crops(trainer))
        return data.MultiCropBatch(_views(trainer, 2 * rows), small, _zeros(rows))
    batch = data.CollectionBatch(_views(trainer, rows), _zeros(rows))
    if not isinstance(trainer, Slade):
        return batch
    if not config.uses_unlabeled:
        return SladeBatch(batch, None)
    trainer.pseudo_labels = _zeros(len(trainer.unlabeled))  # those of a round
    return SladeBatch(batch, data.CollectionBatch(_views(trainer, rows), _zeros(rows)))


def _views(trainer: Trainer, count: int, side: int | None = None) -> Tensor:
    side = trainer.seen.image_size if side is None else side
    return torch.zeros(count, trainer.seen.channels, side, side)


def _side_of_small_crops(trainer: SwAV) -> int:
    small: Any = trainer.views.small
    return int(small.size if hasattr(small, "size") else small.view.crop.size)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def without_files(config: Any, *, rows: int) -> Any:
    """The settings with nothing that has to be read, and another ``batch_size``."""
    changed = {"labels_file": None, "classes_file": None, "fold": 0}
    chosen = dataclasses.replace(
        config.data,
        **{name: value for name, value in changed.items() if getattr(config.data, name, value) != value},
    )
    run = dataclasses.replace(config.run, out=None, compile=False, workers=0)
    return dataclasses.replace(config, data=chosen, run=run, weights=None, batch_size=rows)
