# SPDX-License-Identifier: BSD-3-Clause
"""Lists of the classes to train, validate and test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

PARTS = ("train", "validation", "test")


def read_classes(path: str | Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes to train, validate and test on that a list names: three sorted int64 arrays. Those that it does not
    name are left out; there may be none to validate on.

    Args:
        path: text, a class in every line, by its name or its number from 0, then a tab or spaces and one of train,
            validation (or val) and test.
        class_names: of the L classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not of this form, a class is not there or comes twice, or none is to train or to test on.
            The message has the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such list of classes")
    number = {str(i): i for i in range(len(class_names))} | {name: i for i, name in enumerate(class_names)}
    part_of_class: dict[int, str] = {}
    for place, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, part = line.strip().replace("\t", " ").rpartition(" ")
        name, part = name.strip(), "validation" if part == "val" else part
        if part not in PARTS or not name:
            raise ValueError(
                f"{path}, line {place}: {line.strip()!r} should be a class and one of train, validation and test"
            )
        if name not in number:
            raise ValueError(f"{path}, line {place}: {name!r} is none of the {len(class_names)} classes")
        if number[name] in part_of_class:
            raise ValueError(f"{path}, line {place}: {name!r} comes twice")
        part_of_class[number[name]] = part
    train, validation, test = (
        np.array(sorted(label for label, part in part_of_class.items() if part == wanted), dtype=np.int64)
        for wanted in PARTS
    )
    if len(train) == 0 or len(test) == 0:
        raise ValueError(f"{path} has {len(train)} classes to train on and {len(test)} to test on; it should have both")
    return train, validation, test
