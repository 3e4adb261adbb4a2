# SPDX-License-Identifier: BSD-3-Clause
"""Bytes that a process has of its own for the paths and labels of many images, in several forms.

python bench/file_lists.py [--images 1000000]

"pickled" is what a loading process gets that is started anew instead of forked.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssmkernels.data import FileImages

CLASSES = 1000


def paths(count: int) -> Iterator[str]:
    """As ImageNet's, with a few of long names."""
    for number in range(count):
        label = number * CLASSES // count
        rest = "_from_a_collection_of_long_names" if number % 1000 == 0 else ""
        yield f"/data/imagenet/train/n{label:08d}/n{label:08d}_{number}{rest}.JPEG"


def tuples(count: int) -> Any:
    return [(path, number * CLASSES // count) for number, path in enumerate(paths(count))]


def of_one_width(count: int) -> Any:
    return np.array([path.encode() for path in paths(count)]), np.arange(count) * CLASSES // count


def in_memory(count: int) -> Any:
    return FileImages(paths(count), np.arange(count) * CLASSES // count, CLASSES)


def measured(make: Callable[[], Any]) -> tuple[int, int, int]:
    """Bytes that are kept, the most that there were on the way, and those of a pickle."""
    tracemalloc.start()
    made = make()
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept, most, len(pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    count = parser.parse_args().images
    print(f"{count} images; bytes an image: kept, most on the way, pickled")
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, "train.txt"), "w") as file:
            file.writelines(f"{path}\n" for path in paths(count))
        np.save(Path(folder, "train.npy"), np.arange(count) * CLASSES // count)
        forms: dict[str, Callable[[], Any]] = {
            "list of (path, label)": lambda: tuples(count),
            "array of the longest path": lambda: of_one_width(count),
            "FileImages": lambda: in_memory(count),
            "FileImages.listed": lambda: FileImages.listed(
                Path(folder, "train.txt"), Path(folder, "train.npy"), CLASSES
            ),
        }
        for name, make in forms.items():
            kept, most, pickled = (size / count for size in measured(make))
            print(f"{name:26} {kept:8.2f} {most:8.2f} {pickled:8.2f}")


if __name__ == "__main__":
    main()
