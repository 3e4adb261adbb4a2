# SPDX-License-Identifier: BSD-3-Clause
"""Lists of labelled images: those that others published, and the labels.txt of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ssmkernels.data.images import FileImages, ImageDataset, mapped_integers
from ssmkernels.data.retrieval import ImageSubset

CIFAR_FILE = re.compile(r"(\d+)_.+\.png")
"""LP-DeepSSL unpacks CIFAR into files of this name, numbered in the order of the data set."""
SHARDED = re.compile(r"(.+),\d+,\d+")
"""FixMatch's lists for ImageNet: a file name, its shard and its place there."""


class _Entry(NamedTuple):
    """A line of a list."""

    place: str
    """Where it stands, "line 3"."""
    image: str
    """The number or the file name of an image, or a line that starts with it."""
    class_name: str | None = None


def read_labels(path: str | Path, images: ImageDataset, class_names: Sequence[str]) -> np.ndarray:
    r"""The sorted positions [K] (int64) among ``images`` of those that a list names.

    =========================== ====================================================================================
    SimMatch, ``semi_files``    text: a file name in every line, ``n02108551_8323.JPEG``
    LP-DeepSSL                  text: a file name and a class, ``40733_airplane.png airplane``; where the images are in
                                memory, the number is that of the image
    USB, TorchSSL               .npy: integers, the numbers of the images
    FixMatch (TensorFlow)       .json: ``{"label": [numbers], …}``; for ImageNet text: ``n01770081_5195.JPEG,0,0``
    labels.txt of a run         text: a file name or a number, a tab and a class
    =========================== ====================================================================================

    A file name may have folders before it, as many as it takes to be the only one. Numbers count from 0, in the order
    of the data set. Of a subset (:class:`ssmkernels.data.ImageSubset`) the names and numbers are those of the images
    that it is taken from.

    Args:
        images: N images.
        class_names: of the L classes. Where they are just numbers and those of the list are not, a class of the list
            has to be the same number throughout.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is in none of these forms, an image is not there or comes twice, a number is out of range,
            or a class is not that of the image. The message has the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such list of labelled images")
    base, index = _base(images)
    position = np.full(len(base), -1, dtype=np.int64)
    position[index] = np.arange(len(index))
    if path.suffix == ".npy":
        numbered = _positions_of(mapped_integers(path), position, images)
        if numbered is not None:
            return numbered
    entries = _entries(path)
    if not entries:
        raise ValueError(f"{path} lists no images; it should list at least one")
    lookup = _FileNames(base, entries)
    number_of_class: dict[str, int] = {}
    place_of_image: dict[int, str] = {}
    for entry in entries:
        number, class_name = lookup.find(path, entry)
        if number in place_of_image:
            raise ValueError(f"{path}, {entry.place}: {entry.image!r} is already in {place_of_image[number]}")
        if position[number] < 0:
            raise ValueError(f"{path}, {entry.place}: {entry.image!r} is none of the {len(images)} images to train on")
        label = int(images.labels[position[number]])
        if label < 0:
            raise ValueError(f"{path}, {entry.place}: the class of {entry.image!r} is not known")
        if class_name is not None and not _same_class(class_name, label, class_names, number_of_class):
            raise ValueError(
                f"{path}, {entry.place}: {entry.image!r} is of class {class_names[label]!r} and not {class_name!r}"
            )
        place_of_image[number] = entry.place
    return np.sort(position[list(place_of_image)])


def _positions_of(numbers: np.ndarray, position: np.ndarray, images: ImageDataset) -> np.ndarray | None:
    """The sorted positions of images by their numbers, without an object for each; None where one is wrong, which is
    then looked for among the entries.
    """
    if len(numbers) == 0 or numbers.min() < 0 or numbers.max() >= len(position):
        return None
    positions = np.sort(position[numbers])
    is_right = (
        positions[0] >= 0 and bool((np.diff(positions) > 0).all()) and bool((images.labels[positions] >= 0).all())
    )
    return positions if is_right else None


def labels_text(index: np.ndarray, images: ImageDataset, class_names: Sequence[str]) -> str:
    """The labels.txt of a run, a line for each of the labelled images, which :func:`read_labels` reads.

    Args:
        index: [K] positions among ``images`` of those with labels.
        images: N images.
        class_names: of the L classes.
    """
    base, numbers = _base(images)
    names = base.names(numbers[index]) if isinstance(base, FileImages) else map(str, numbers[index])
    labels = images.labels[index]
    return "".join(f"{name}\t{class_names[label]}\n" for name, label in zip(names, labels, strict=True))


class _FileNames:
    """Which images the entries of a list are."""

    def __init__(self, images: ImageDataset, entries: list[_Entry]) -> None:
        self.count = len(images)
        self.numbers: dict[str, list[int]] | None = None
        if isinstance(images, FileImages):
            self.paths = images
            wanted = {_base_name(name) for entry in entries for name in (entry.image, entry.image.partition(" ")[0])}
            self.numbers = images.by_base_name(wanted)

    def find(self, path: Path, entry: _Entry) -> tuple[int, str | None]:
        """The number of an image, and its class where the list has one."""
        for name, class_name in ((entry.image, entry.class_name), *_name_and_class(entry)):
            number = self._number(path, entry, name)
            if number is not None:
                return number, class_name
        if self.numbers is None:
            raise ValueError(
                f"{path}, {entry.place}: {entry.image!r} is no number; these images have no file names, so a list has"
                " their numbers"
            )
        raise ValueError(f"{path}, {entry.place}: {entry.image!r} is the file name of no image")

    def _number(self, path: Path, entry: _Entry, name: str) -> int | None:
        in_memory = CIFAR_FILE.fullmatch(name) if self.numbers is None else None
        if in_memory or re.fullmatch(r"-?\d+", name):
            number = int(in_memory[1] if in_memory else name)
            if not 0 <= number < self.count:
                raise ValueError(
                    f"{path}, {entry.place}: image {number} is out of range; it should be in [0, {self.count})"
                )
            return number
        numbers = (self.numbers or {}).get(_base_name(name), [])
        if "/" in name:
            numbers = [number for number in numbers if f"/{self.paths.path(number)}".endswith(f"/{name.lstrip('/')}")]
        if len(numbers) > 1:
            raise ValueError(
                f"{path}, {entry.place}: {len(numbers)} images have the name {name!r}; it should have their folder"
                " before it"
            )
        return numbers[0] if numbers else None


def _entries(path: Path) -> list[_Entry]:
    if path.suffix == ".npy":
        return [_Entry(f"entry {place}", str(number)) for place, number in enumerate(mapped_integers(path))]
    text = _text(path)
    if path.suffix == ".json":
        return [_Entry(f"entry {place}", str(number)) for place, number in enumerate(_json(path, text))]
    entries = []
    for place, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            image, tab, class_name = line.partition("\t")
            sharded = SHARDED.fullmatch(image)
            entries.append(
                _Entry(f"line {place}", sharded[1] if sharded else image.strip(), class_name.strip() if tab else None)
            )
    return entries


def _name_and_class(entry: _Entry) -> list[tuple[str, str]]:
    """A line with a space between a name and a class."""
    name, space, class_name = entry.image.partition(" ")
    return [(name, class_name.strip())] if space and entry.class_name is None else []


def _json(path: Path, text: str) -> list[int]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    numbers = content.get("label") if isinstance(content, dict) else content
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f'{path} should have a list of integers, by itself or as "label"')
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither text nor a .npy file: {error}") from error


def _base(images: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """The images that a subset of a subset is taken from, and which of them it has."""
    if not isinstance(images, ImageSubset):
        return images, np.arange(len(images))
    base, index = _base(images.dataset)
    return base, index[images.index]


def _same_class(class_name: str, label: int, class_names: Sequence[str], number_of_class: dict[str, int]) -> bool:
    if class_name == class_names[label]:
        return True
    unnamed = all(name == str(number) for number, name in enumerate(class_names))
    if not unnamed or class_name.isdigit():
        return False
    one_to_one = class_name in number_of_class or label not in number_of_class.values()
    return one_to_one and number_of_class.setdefault(class_name, label) == label


def _base_name(name: str) -> str:
    return PurePosixPath(name).name
