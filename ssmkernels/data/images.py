# SPDX-License-Identifier: BSD-3-Clause
"""Labelled images, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ssmkernels.data.paths import PathList


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
        paths: N files that Pillow can read. They are gone through once, and kept in as many bytes as they are long.
        labels: [N] integers in [0, num_classes), or −1 where none is known. An array of int64 is not copied.
        num_classes: number of classes L.
    """

    def __init__(self, paths: Iterable[str | Path] | PathList, labels: np.ndarray, num_classes: int) -> None:
        self._paths = paths if isinstance(paths, PathList) else PathList.of(paths)
        self._folder = b""
        self.labels = _checked_labels(labels, len(self._paths), num_classes)
        self.num_classes = num_classes
        self._labels_file: Path | None = None

    @classmethod
    def listed(cls, paths: str | Path, labels: str | Path, num_classes: int) -> FileImages:
        """The files that a text file names, a path in every line, from the folder of that file where it is not
        absolute. Both lists are memory-mapped: the processes of a machine have them in memory once, ranks and their
        loading processes alike.

        Args:
            paths: the text file, of N lines.
            labels: .npy, [N] integers as above; only those of int64 are mapped, others are converted in memory.
            num_classes: number of classes L.

        Raises:
            FileNotFoundError: one of the two is not there.
            ValueError: one is not as said above; the message names it.
        """
        paths, labels = Path(paths).absolute(), Path(labels).absolute()
        images = cls.__new__(cls)
        images._paths, images._folder = PathList.mapped(paths), os.fsencode(paths.parent)
        numbers = mapped_integers(labels)
        try:
            images.labels = _checked_labels(numbers, len(images._paths), num_classes)
        except ValueError as error:
            raise ValueError(f"{labels}, for the lines of {paths}: {error}") from error
        images.num_classes = num_classes
        images._labels_file = labels if numbers.dtype == np.int64 else None
        return images

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({} if self._labels_file is None else {"labels": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._labels_file is not None:
            self.labels = mapped_integers(self._labels_file)

    def image(self, index: int) -> Image.Image:
        with Image.open(self.path(index)) as image:
            return image.convert("RGB")

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._folder, self._paths[index]))

    def names(self, index: np.ndarray) -> list[str]:
        """Paths of some images from the folder that all N are in."""
        first = last = os.fsencode(self.path(0))
        for line in self._paths:
            path = os.path.join(self._folder, line)
            first, last = min(first, path), max(last, path)
        folder = os.fsdecode(os.path.commonpath([os.path.dirname(path) for path in (first, last)]))
        return [os.path.relpath(self.path(place), folder or ".") for place in index]

    def by_base_name(self, wanted: Collection[str]) -> dict[str, list[int]]:
        """The images whose files have one of some names, their folders left out."""
        numbers: dict[str, list[int]] = {}
        for number, path in enumerate(self._paths):
            name = os.fsdecode(path.rpartition(b"/")[2])
            if name in wanted:
                numbers.setdefault(name, []).append(number)
        return numbers


def mapped_integers(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or not of integers [N].
    """
    try:
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        what = f"{numbers.dtype} of shape {numbers.shape}" if isinstance(numbers, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {what}; it should hold integers of shape [K]")
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
    return labels.astype(np.int64, copy=False)
