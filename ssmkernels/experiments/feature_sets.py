# SPDX-License-Identifier: BSD-3-Clause
"""Real images as features for propagation: pixels of those inside packages, EfficientNet-Lite0 features of those in a folder."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmkernels import data, models


class FeatureSet(NamedTuple):
    features: Tensor
    """[N, d] float32."""
    labels: Tensor
    """[N] int64."""


@dataclass(frozen=True)
class Source:
    """Where a set comes from: its title, its file in the folder of the data (none for images inside packages), and how it is read."""

    title: str
    file: str | None = None
    read: Callable[[Any], tuple[list[Image.Image], np.ndarray]] | None = None
    size: int = 0
    """Side of the images that EfficientNet-Lite0 sees."""


def available(folder: str | None) -> dict[str, Source]:
    """The sets that can be had: those inside packages, and those whose file is in ``folder``."""
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"--data is {folder!r}, which is no folder; it should have {', '.join(_files())}")
    there = [each for each in _files() if folder is not None and (Path(folder) / each).is_file()]
    found = {name: each for name, each in SOURCES.items() if each.file is None or each.file in there}
    if folder is not None and not there:
        raise FileNotFoundError(f"--data is {folder!r}; it should have at least one of {', '.join(_files())}")
    return found


def load(name: str, folder: str | None, cache: Path) -> FeatureSet:
    """The set ``name``; features of a network are kept in ``cache`` and made once."""
    source = SOURCES[name]
    if source.file is None or source.read is None:
        images = data.load_collection(name).images
        pixels = np.stack([np.asarray(images.image(i), dtype=np.float32).ravel() for i in range(len(images))])
        return FeatureSet(torch.from_numpy(pixels), torch.from_numpy(images.labels))
    kept = cache / f"{name}-{source.size}px.npz"
    if not kept.exists():
        with np.load(Path(folder or ".") / source.file, allow_pickle=False) as archive:
            pictures, labels = source.read(archive)
        print(f"{source.title}: features of {len(labels)} images", flush=True)
        features = models.extract_features("efficientnet-lite0", _Batches(pictures, source.size))
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_name("unfinished.npz")
        np.savez(unfinished, features=features.numpy(), labels=labels)
        unfinished.replace(kept)
    with np.load(kept) as archive:
        return FeatureSet(torch.from_numpy(archive["features"]), torch.from_numpy(archive["labels"]))


class _Batches:
    """Images of one size, 64 at a time, normalised as EfficientNet-Lite0 wants them: (x − 127)/128."""

    def __init__(self, images: list[Image.Image], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // 64)

    def __iter__(self) -> Iterator[Tensor]:
        for begin in range(0, len(self.images), 64):
            resized = [image.resize((self.size, self.size), Image.Resampling.BILINEAR) for image in self.images[begin : begin + 64]]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
            yield (pixels.float() - 127) / 128


def _decode(blobs: Iterator[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(blob)).convert("RGB") for blob in blobs]


def read_flowers17(archive: Any) -> tuple[list[Image.Image], np.ndarray]:
    """Arrays data (files of images, one after another), offsets [N + 1] and labels [N]."""
    blob, offsets = archive["data"].tobytes(), archive["offsets"]
    return _decode(blob[a:b] for a, b in itertools.pairwise(offsets)), archive["labels"].astype(np.int64)


def _read_cifar10(archive: Any, rows: slice) -> tuple[list[Image.Image], np.ndarray]:
    """JPEG files that share their header: arrays header, tails, tail_len [N], labels [N] and n_train."""
    header, tails = archive["header"].tobytes(), archive["tails"].tobytes()
    stops = np.cumsum(archive["tail_len"], dtype=np.int64)
    starts = stops - archive["tail_len"]
    pieces = zip(starts[rows], stops[rows], strict=True)
    return _decode(header + tails[a:b] + b"\xff\xd9" for a, b in pieces), archive["labels"][rows].astype(np.int64)


def _read_cifar10_test(archive: Any) -> tuple[list[Image.Image], np.ndarray]:
    return _read_cifar10(archive, slice(int(archive["n_train"]), None))


def _read_cifar10_train(archive: Any) -> tuple[list[Image.Image], np.ndarray]:
    return _read_cifar10(archive, slice(0, 10_000))


SOURCES = {
    "digits": Source("digits, pixels (1,797; 10 classes)"),
    "mnist5k": Source("MNIST-5k, pixels (5,000; 10)"),
    "flowers17": Source("17-flowers, 224 px (1,360; 17)", "flowers17.npz", read_flowers17, size=224),
    "cifar10-test": Source("CIFAR-10 test, 128 px (10,000; 10)", "cifar10.npz", _read_cifar10_test, size=128),
    "cifar10-train": Source("CIFAR-10 train, 128 px (first 10,000; 10)", "cifar10.npz", _read_cifar10_train, size=128),
}


def _files() -> list[str]:
    return sorted({source.file for source in SOURCES.values() if source.file is not None})
