# SPDX-License-Identifier: BSD-3-Clause
"""Data sets with their official splits into training, validation and test images, for linear evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssmkernels.data.images import FileImages, ImageDataset
from ssmkernels.data.readers import _require, load_dataset, outside
from ssmkernels.data.retrieval import ImageSubset
from ssmkernels.data.retrieval_readers import cars_in_one_folder, path_itself
from ssmkernels.data.split import split_labels

HELD_OUT = 0.2
"""Share of the training images to validate on, where there is no official split of them; a fixed draw in proportion
to the classes.
"""


class TransferImages(NamedTuple):
    """Images to fit, to pick the penalty with, and to test on."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset


class _Source(NamedTuple):
    reader: str
    """Of ``torchvision.datasets``."""
    splits: tuple[str, ...]
    """To train, validate and test on, or to train and test on."""
    looked_for: str
    loads_paths: bool = True
    hint: str = ""
    """Where torchvision cannot fetch it."""


_SOURCES = {
    "food101": _Source("Food101", ("train", "test"), "food-101/ with images/ and meta/"),
    "cars196": _Source(
        "StanfordCars",
        ("train", "test"),
        "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat",
        hint="Its first address is gone: get a copy, such as the one on kaggle.com, and lay it out like this.",
    ),
    "dtd": _Source("DTD", ("train", "val", "test"), "dtd/dtd/ with images/ and labels/"),
    "pets": _Source(
        "OxfordIIITPet", ("trainval", "test"), "oxford-iiit-pet/ with images/ and annotations/", loads_paths=False
    ),
    "flowers102": _Source(
        "Flowers102", ("train", "val", "test"), "flowers-102/ with jpg/, imagelabels.mat and setid.mat"
    ),
}
_IN_MEMORY = ("cifar10", "cifar100", "digits", "mnist5k")
TRANSFER_SETS = (*_SOURCES, *_IN_MEMORY)


def load_transfer_images(name: str, root: str | Path | None = None) -> TransferImages:
    """The data set ``name``: food101, cars196, dtd (its first split), pets, flowers102, as torchvision downloads them,
    cars196 also as cars_annos.mat and car_ims/; cifar10 and cifar100; digits and mnist5k, which are inside packages.

    Args:
        root: the folder of the data (by default ``data``), or the folder that a set comes in.

    Raises:
        FileNotFoundError: the data is not there; it says what was looked for, where, and how to get it.
        ImportError: a package that reads the data is not installed.
        ValueError: the name is unknown.
    """
    if name in _IN_MEMORY:
        splits = load_dataset(name, root)
        return TransferImages(*_held_out(splits.train), splits.test)
    if name not in _SOURCES:
        raise ValueError(f"name is {name!r}; it should be one of {', '.join(TRANSFER_SETS)}")
    folder = Path("data" if root is None else root)
    cars = cars_in_one_folder(folder) if name == "cars196" else None
    if cars is not None:
        samples = np.array(cars.samples, dtype=object)
        parts = [_file_images(part, len(cars.names)) for part in (samples[~cars.is_test], samples[cars.is_test])]
    else:
        parts = _read(name, _SOURCES[name], folder)
    return TransferImages(*parts) if len(parts) == 3 else TransferImages(*_held_out(parts[0]), parts[1])


def _read(name: str, source: _Source, root: Path) -> list[FileImages]:
    reader = getattr(_require("torchvision.datasets", "torchvision"), source.reader)
    root = outside(root, source.looked_for.partition("/")[0])
    options: dict[str, Any] = {"loader": path_itself} if source.loads_paths else {}
    try:
        parts = [reader(root, split=split, **options) for split in source.splits]
    except (RuntimeError, FileNotFoundError) as error:
        fetch = (
            f"fetch it with\n  python -c \"from torchvision.datasets import {source.reader}; {source.reader}('{root}',"
            ' download=True)"'
        )
        raise FileNotFoundError(
            f"{name}: looked for {source.looked_for} in {root.resolve()} and found none, or an incomplete one. "
            + (source.hint or f"Give the folder that it lies in as root, or {fetch}")
        ) from error
    samples = [_samples(part, source) for part in parts]
    classes = 1 + max(label for part in samples for _, label in part)
    return [_file_images(part, classes) for part in samples]


def _file_images(samples: Sequence[tuple[str | Path, int]], classes: int) -> FileImages:
    return FileImages([path for path, _ in samples], np.array([label for _, label in samples]), classes)


def _samples(part: Any, source: _Source) -> Sequence[tuple[str | Path, int]]:
    if source.loads_paths:
        return [part[i] for i in range(len(part))]
    return list(zip(part._images, part._labels, strict=True))  # this reader has no ``loader``


def _held_out(images: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    labels = np.asarray(images.labels)
    count = max(images.num_classes, round(HELD_OUT * len(labels)))
    held = split_labels(labels, count, seed=0, proportional=True)
    kept = np.setdiff1d(np.arange(len(labels)), held)
    subsets = [ImageSubset(images, index, labels[index], images.num_classes) for index in (kept, held)]
    return subsets[0], subsets[1]
