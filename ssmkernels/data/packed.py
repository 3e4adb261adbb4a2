# SPDX-License-Identifier: BSD-3-Clause
"""Archives (.npz) that hold images as files, as small as those files are."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

ONE_AFTER_ANOTHER = ("data", "offsets", "labels")
"""The bytes of N image files, where they begin and the last one ends [N + 1], and their classes [N]."""
COMMON_HEADER = ("header", "tails", "tail_len", "labels", "n_train")
"""N JPEG files without the header that all of them have and without their end marker: that header, the rest of the
files one after another, its lengths [N], the classes [N], and how many images, the first ones, are to train on.
"""
_END_OF_IMAGE = b"\xff\xd9"


def is_packed(archive: Any) -> bool:
    """Whether an open archive is of one of the two forms."""
    return any(set(names) <= set(archive) for names in (ONE_AFTER_ANOTHER, COMMON_HEADER))


def packed_images(archive: Any, rows: slice = slice(None)) -> tuple[list[Image.Image], np.ndarray]:
    """Some images of a packed archive, decoded to RGB, and their classes, int64.

    Raises:
        ValueError: the arrays do not belong together.
    """
    files = _files(archive)
    labels = np.asarray(archive["labels"]).astype(np.int64)
    if len(files) != len(labels):
        raise ValueError(
            f"the archive has {len(files)} images and {len(labels)} labels; it should have as many of either"
        )
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files[rows]], labels[rows]


def packed_arrays(archive: Any, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The same as arrays, [N, H, W, 3] uint8 and [N].

    Raises:
        ValueError: the images are not of one size, or the arrays do not belong together.
    """
    images, labels = packed_images(archive, rows)
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"the archive has images of {len(sizes)} sizes; they should be of one")
    return np.stack([np.asarray(image) for image in images]) if images else np.zeros((0, 1, 1, 3), np.uint8), labels


def _files(archive: Any) -> list[bytes]:
    return list(_common_header(archive) if "tails" in archive else _one_after_another(archive))


def _one_after_another(archive: Any) -> Iterator[bytes]:
    data = archive["data"].tobytes()
    for begin, end in itertools.pairwise(archive["offsets"]):
        yield data[begin:end]


def _common_header(archive: Any) -> Iterator[bytes]:
    header, tails = archive["header"].tobytes(), archive["tails"].tobytes()
    for begin, end in itertools.pairwise(itertools.accumulate(archive["tail_len"].tolist(), initial=0)):
        yield header + tails[begin:end] + _END_OF_IMAGE
