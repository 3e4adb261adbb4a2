# SPDX-License-Identifier: BSD-3-Clause
"""What a run keeps of the lists and weights that it began with: it goes on, and is evaluated, by its own copies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssmkernels import data
from ssmkernels.trainers.checkpoint import latest_checkpoint, load_checkpoint
from ssmkernels.trainers.ranks import this_rank

CLASSES = "classes.txt"
LABELS = "labels.txt"
START = "start.pt"
"""Initial weights of the backbone, where networks of a run start from them again."""


def has_begun(config: Any) -> bool:
    """Whether the run of ``config`` has a checkpoint."""
    return config.run.out is not None and latest_checkpoint(Path(config.run.out)) is not None


def kept_file(name: str, config: Any, before: Path | None = None) -> Path | None:
    """The copy ``name`` of a run that has begun, or the one in the folder ``before``; None where there is none."""
    folders = [Path(config.run.out)] if has_begun(config) else []
    if before is not None:
        folders.append(before)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_labels(config: Any, images: data.ImageDataset, class_names: Sequence[str]) -> np.ndarray:
    """:func:`ssmkernels.data.read_labels` of ``config.data.labels_file``, or of the run's own copy."""
    return _read("labels_file", config, LABELS, None, lambda path: [data.read_labels(path, images, class_names)])[0]


def read_classes(
    config: Any, class_names: Sequence[str], before: Path | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`ssmkernels.data.read_classes` of ``config.data.classes_file``, or of the run's own copy."""
    train, validation, test = _read(
        "classes_file", config, CLASSES, before, lambda path: data.read_classes(path, class_names)
    )
    return train, validation, test


def classes_text(config: Any, before: Path | None = None) -> str | None:
    """The list of classes of a run, None where it has none."""
    given = getattr(config.data, "classes_file", None)
    if given is None:
        return None
    return (kept_file(CLASSES, config, before) or Path(given)).read_text(encoding="utf-8-sig")


def _read(
    setting: str, config: Any, name: str, before: Path | None, read: Callable[[Path], Sequence[np.ndarray]]
) -> Sequence[np.ndarray]:
    """What the list of a setting says: the kept one, where there is one. Says so where the given one differs.

    Raises:
        ValueError: the given one is another file than the run began with, and differs.
    """
    given, own = Path(getattr(config.data, setting)), kept_file(name, config, before)
    if own is None:
        return read(given)
    chosen = read(own)
    if not given.is_file() or _says(given, chosen, read):
        return chosen
    checkpoint = latest_checkpoint(Path(config.run.out)) if has_begun(config) else None
    if checkpoint is not None and load_checkpoint(checkpoint)["config"]["data"][setting] != str(given):
        what = "labelled images" if name == LABELS else "classes"
        raise ValueError(
            f"{own} has other {what} than {given}; give it as --data.{setting}, or another folder with --run.out"
        )
    if this_rank()[0] == 0:
        print(f"{given} has changed since the run began, whose copy, {own}, is used", file=sys.stderr)
    return chosen


def _says(path: Path, expected: Sequence[np.ndarray], read: Callable[[Path], Sequence[np.ndarray]]) -> bool:
    """Whether the list at ``path`` can be read, and as ``expected``."""
    try:
        return all(map(np.array_equal, read(path), expected))
    except (ValueError, OSError):
        return False
