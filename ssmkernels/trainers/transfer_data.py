# SPDX-License-Identifier: BSD-3-Clause
"""Data sets with their official splits into training, validation and test images, for linear evaluation."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssmkernels import data

HELD_OUT = 0.2
"""Share of the training images to validate on, where there is no official split of them; a fixed draw in proportion
to the classes.
"""


class TransferImages(NamedTuple):
    """Images to fit, to pick the penalty with, and to test on."""

    train: data.ImageDataset
    validation: data.ImageDataset
    test: data.ImageDataset


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
    """The data set ``name``: food101, cars196, dtd (its first split), pets, flowers102, as torchvision downloads them;
    cifar10 and cifar100; digits and mnist5k, which are inside packages.

    Args:
        root: the folder of the data (by default ``data``).

    Raises:
        FileNotFoundError: the data is not there; it says what was looked for, where, and how to get it.
        ImportError: a package that reads the data is not installed.
        ValueError: the name is unknown.
    """
    if name in _IN_MEMORY:
        splits = data.load_dataset(name, root)
        return TransferImages(*_held_out(splits.train), splits.test)
    if name not in _SOURCES:
        raise ValueError(f"name is {name!r}; it should be one of {', '.join(TRANSFER_SETS)}")
    parts = _read(name, _SOURCES[name], Path("data" if root is None else root))
    return TransferImages(*parts) if len(parts) == 3 else TransferImages(*_held_out(parts[0]), parts[1])


def _read(name: str, source: _Source, root: Path) -> list[data.FileImages]:
    try:
        reader = getattr(importlib.import_module("torchvision.datasets"), source.reader)
    except ImportError as error:
        raise ImportError(
            f"{name} needs torchvision ({error}); install it with: pip install 'ssmkernels[train]'"
        ) from error
    options: dict[str, Any] = {"loader": _path} if source.loads_paths else {}
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
    return [
        data.FileImages([path for path, _ in part], np.array([label for _, label in part]), classes) for part in samples
    ]


def _samples(part: Any, source: _Source) -> Sequence[tuple[str | Path, int]]:
    if source.loads_paths:
        return [part[i] for i in range(len(part))]
    return list(zip(part._images, part._labels, strict=True))  # this reader has no ``loader``


def _path(path: str | Path) -> str | Path:
    """A ``loader`` with which torchvision's readers list their files instead of reading them."""
    return path


def _held_out(images: data.ImageDataset) -> tuple[data.ImageDataset, data.ImageDataset]:
    labels = np.asarray(images.labels)
    count = max(images.num_classes, round(HELD_OUT * len(labels)))
    held = data.split_labels(labels, count, seed=0, proportional=True)
    kept = np.setdiff1d(np.arange(len(labels)), held)
    subsets = [data.ImageSubset(images, index, labels[index], images.num_classes) for index in (kept, held)]
    return subsets[0], subsets[1]
