# SPDX-License-Identifier: BSD-3-Clause
"""Labelled images, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image


class ImageDataset(Protocol):
    """Images with labels. ``labels`` is int64 [N] with values in [0, num_classes), or −1 where none is known: such
    images are only ever unlabelled ones.
    """

    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index``, of mode RGB or L."""


class ArrayImages:
    """Images in memory.

    Args:
        images: uint8, [N, H, W] (grey) or [N, H, W, 3] (RGB).
        labels: [N] integers in [0, num_classes), or −1 where none is known.
        num_classes: number of classes L.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise ValueError(
                f"images is {images.dtype} of shape {images.shape}; it should be uint8 of shape [N, H, W] or [N, H,"
                " W, 3]"
            )
        self.images = images
        self.labels = _checked_labels(labels, len(images), num_classes)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


class FileImages:
    """Images read from their files when they are asked for, as RGB.

    Args:
        paths: N files that Pillow can read.
        labels: [N] integers in [0, num_classes), or −1 where none is known.
        num_classes: number of classes L.
    """

    def __init__(self, paths: Sequence[str | Path], labels: np.ndarray, num_classes: int) -> None:
        # One array, not a million strings whose reference counts would unshare the memory of loading processes.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = _checked_labels(labels, len(paths), num_classes)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        with Image.open(self.path(index)) as image:
            return image.convert("RGB")

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def names(self, index: np.ndarray) -> list[str]:
        """Paths of some images from the folder that all N are in."""
        files = self._paths.tolist()
        folder = os.path.commonpath([os.path.dirname(path) for path in (min(files), max(files))])
        return [os.fsdecode(os.path.relpath(files[place], folder or b".")) for place in index]

    def by_base_name(self, wanted: Collection[str]) -> dict[str, list[int]]:
        """The images whose files have one of some names, their folders left out."""
        numbers: dict[str, list[int]] = {}
        for number, path in enumerate(self._paths.tolist()):
            name = os.fsdecode(path.rpartition(b"/")[2])
            if name in wanted:
                numbers.setdefault(name, []).append(number)
        return numbers


def file_of(dataset: ImageDataset, index: int) -> str | None:
    """The file of an image; None where the data set does not say that it is in one, by a method ``path``."""
    path = getattr(dataset, "path", None)
    return None if path is None else path(index)


@dataclass(frozen=True)
class ImageSplits:
    """A data set: images to train on, with and without their labels, and images to test on.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
        image_size: side of the square images that the network sees.
        augmentation: which views are natural, see :func:`ssmkernels.data.default_transforms`.
    """

    train: ImageDataset
    test: ImageDataset
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    augmentation: Literal["crop-flip", "crop", "imagenet"] = "crop-flip"

    @property
    def channels(self) -> int:
        return len(self.mean)


def _checked_labels(labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels is {labels.dtype} of shape {labels.shape}; it should be integers of shape [{count}]")
    if count and (labels.min() < -1 or labels.max() >= num_classes):
        raise ValueError(
            f"labels are in [{labels.min()}, {labels.max()}]; they should be in [0, {num_classes}), up to num_classes,"
            " or -1 where none is known"
        )
    return labels.astype(np.int64)
