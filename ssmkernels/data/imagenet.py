# SPDX-License-Identifier: BSD-3-Clause
"""ImageNet's validation images as they are published: 50,000 files in one folder, and a list of their classes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
"""A number a line, of the images by their names; meta.mat beside it says what the numbers are."""
KAGGLE = "LOC_val_solution.csv"
"""The name of an image, without .JPEG, and the class with a box for each object."""


def listed_validation(root: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """The files root/val/* and their classes, by the list that lies in ``root``, in root/val or in the development kit
    (ILSVRC2012_devkit_t12/data): see :func:`ssmkernels.data.load_dataset`.

    Args:
        root: the folder of train/ and val/.
        class_names: WordNet's numbers, n01440764 and so on: the folders of train/, sorted.

    Raises:
        FileNotFoundError: there is no list, or none of meta.mat beside the ground truth.
        ValueError: the list has other images than the folder, or a class that is none of ``class_names``.
    """
    folders = [root, root / "val", root / "ILSVRC2012_devkit_t12" / "data", root / "devkit" / "data"]
    files = sorted(file for file in (root / "val").iterdir() if file.suffix.lower() in (".jpeg", ".jpg", ".png"))
    for name, read in ((GROUND_TRUTH, _ground_truth), (KAGGLE, _kaggle), ("val.txt", _names_and_classes)):
        for path in (folder / name for folder in folders):
            if path.is_file():
                return _matched(path, files, read(path, files), class_names)
    raise FileNotFoundError(
        f"imagenet: {root / 'val'} has no folders of classes, and there is no list of them: looked for {GROUND_TRUTH},"
        f" {KAGGLE} and val.txt in {', '.join(map(str, folders))}"
    )


def _matched(
    path: Path, files: Sequence[Path], class_of: dict[str, str], class_names: Sequence[str]
) -> list[tuple[Path, int]]:
    number = {name: label for label, name in enumerate(class_names)} | {
        str(label): label for label in range(len(class_names))
    }
    differing = {file.stem for file in files} ^ class_of.keys()
    if differing:
        raise ValueError(f"{path} and the files in val/ should be of the same images; {min(differing)} is in one only")
    unknown = sorted(set(class_of.values()) - number.keys())
    if unknown:
        raise ValueError(
            f"{path} has the class {unknown[0]!r}; it should be a folder of train/, or a number from 0 to"
            f" {len(class_names) - 1} in their order"
        )
    return [(file, number[class_of[file.stem]]) for file in files]


def _ground_truth(path: Path, files: Sequence[Path]) -> dict[str, str]:
    """Numbers of ILSVRC2012, which are not the order of the folders."""
    from scipy.io import loadmat  # slow to import, and only needed here

    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise FileNotFoundError(
            f"{path} has numbers that only the meta.mat of the development kit says the classes of; it should be beside"
            " it"
        )
    synsets = loadmat(meta, squeeze_me=True)["synsets"]
    class_of_number = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    numbers = path.read_text().split()
    if len(numbers) != len(files):
        raise ValueError(f"{path} has {len(numbers)} lines; val/ has {len(files)} images")
    pairs = zip(files, numbers, strict=True)
    return {file.stem: class_of_number.get(int(number), number) for file, number in pairs}


def _kaggle(path: Path, files: Sequence[Path]) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}


def _names_and_classes(path: Path, files: Sequence[Path]) -> dict[str, str]:
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if any(len(fields) != 2 for fields in lines):
        raise ValueError(f"{path} should have lines of a file name and a class")
    return {Path(name).stem: class_name for name, class_name in lines}
