# SPDX-License-Identifier: BSD-3-Clause
"""Real images as features for propagation: pixels of those inside packages, features of a network of those in a folder.

The network of the paper's sets is BN-Inception where its weights are in the folder, as in the paper, and else
EfficientNet-Lite0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmkernels import data, models
from ssmkernels._files import checksummed_archive, is_whole
from ssmkernels.data.packed import packed_images


class FeatureSet(NamedTuple):
    features: Tensor
    """[N, d] float32."""
    labels: Tensor
    """[N] int64."""


@dataclass(frozen=True)
class Source:
    """Where a set comes from: its title, its file in the folder of the data (none for images inside packages), and
    how it is read.
    """

    title: str
    file: str | None = None
    read: Callable[[Any], tuple[list[Image.Image], np.ndarray]] | None = None
    size: int = 0
    """Side of the images that the network sees."""
    collection: str | None = None
    """One of the paper's sets, as :func:`ssmkernels.data.load_collection` knows it."""


BN_INCEPTION = "bn_inception-52deb4733.pth"


def available(folder: str | None) -> dict[str, Source]:
    """The sets that can be had: those inside packages, and those of which the images are in ``folder``.

    Raises:
        FileNotFoundError: there are none in ``folder``; it says what was looked for.
        ValueError: a set in ``folder`` is damaged.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"--data is {folder!r}, which is no folder; it should have {_wanted()}")
    there = {name for name in SOURCES if folder is not None and _is_there(SOURCES[name], Path(folder))}
    if folder is not None and not there:
        raise FileNotFoundError(f"--data is {folder!r}; it should have {_wanted()}")
    return {
        name: each for name, each in SOURCES.items() if name in there or (each.file is None and each.collection is None)
    }


def _is_there(source: Source, folder: Path) -> bool:
    if source.file is not None:
        return (folder / source.file).is_file()
    if source.collection is None:
        return False
    try:
        data.load_collection(source.collection, folder)
    except FileNotFoundError:
        return False
    return True


def load(name: str, folder: str | None, cache: Path) -> FeatureSet:
    """The set ``name``; features of a network are kept in ``cache`` and made once."""
    source = SOURCES[name]
    if source.collection is not None:
        backbone = network_of(folder)
        kept = cache / f"{name}-{backbone}.npz"
        return _kept(kept) if is_whole(kept) else _collection_features(source, backbone, Path(str(folder)), kept)
    if source.file is None or source.read is None:
        images = data.load_collection(name).images
        pixels = np.stack([np.asarray(images.image(i), dtype=np.float32).ravel() for i in range(len(images))])
        return FeatureSet(torch.from_numpy(pixels), torch.from_numpy(images.labels))
    kept = cache / f"{name}-{source.size}px.npz"
    if not is_whole(kept):
        with np.load(Path(folder or ".") / source.file, allow_pickle=False) as archive:
            pictures, labels = source.read(archive)
        print(f"{source.title}: features of {len(labels)} images", flush=True)
        _keep(kept, models.extract_features("efficientnet-lite0", _Batches(pictures, source.size)), labels)
    return _kept(kept)


def network_of(folder: str | None) -> str:
    """The network of the paper's sets in ``folder``."""
    return "bn-inception" if folder is not None and (Path(folder) / BN_INCEPTION).is_file() else "efficientnet-lite0"


def _collection_features(source: Source, backbone: str, folder: Path, kept: Path) -> FeatureSet:
    collection = data.load_collection(str(source.collection), folder)
    print(f"{source.title}: {backbone} features of {len(collection)} images", flush=True)
    weights = folder / BN_INCEPTION if backbone == "bn-inception" else "imagenet"
    network = models.build_embedding_model(backbone, 1, weights=weights, pooling="avg")
    views = data.retrieval_views(collection, models.preprocessing(backbone), size=source.size)
    batches = data.evaluation_batches(
        collection.images, 128, mean=views.mean, std=views.std, transform=views.evaluation
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _keep(
        kept,
        models.extract_features(network.to(memory_format=torch.channels_last), batches, device=device),
        collection.labels,
    )
    return _kept(kept)


def _keep(path: Path, features: Tensor, labels: np.ndarray) -> None:
    with checksummed_archive(path) as file:
        np.savez(file, features=features.numpy(), labels=labels)


def _kept(path: Path) -> FeatureSet:
    with np.load(path) as archive:
        return FeatureSet(torch.from_numpy(archive["features"]), torch.from_numpy(archive["labels"]))


class _Batches:
    """Images of one size, 64 at a time, normalised as EfficientNet-Lite0 wants them: (x − 127)/128."""

    def __init__(self, images: list[Image.Image], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // 64)

    def __iter__(self) -> Iterator[Tensor]:
        for begin in range(0, len(self.images), 64):
            resized = [
                image.resize((self.size, self.size), Image.Resampling.BILINEAR)
                for image in self.images[begin : begin + 64]
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
            yield (pixels.float() - 127) / 128


def _read_test_images(archive: Any) -> tuple[list[Image.Image], np.ndarray]:
    return packed_images(archive, slice(int(archive["n_train"]), None))


def _read_training_images(archive: Any) -> tuple[list[Image.Image], np.ndarray]:
    return packed_images(archive, slice(0, 10_000))


_PAPER_SETS = {
    "aircraft-family": "aircraft (family)",
    "aircraft-manufacturer": "aircraft (manufacturer)",
    "aircraft-variant": "aircraft (variant)",
    "cars196": "cars",
    "cifar100": "CIFAR100",
    "cub200": "cub",
    "dogs": "dogs",
    "pets": "pets",
    "gtsrb": "traffic_sign",
    "flowers102": "vgg_flowers",
}

SOURCES = {
    "digits": Source("digits, pixels (1,797; 10 classes)"),
    "mnist5k": Source("MNIST-5k, pixels (5,000; 10)"),
    "flowers17": Source("17-flowers, 224 px (1,360; 17)", "flowers17.npz", packed_images, size=224),
    "cifar10-test": Source("CIFAR-10 test, 128 px (10,000; 10)", "cifar10.npz", _read_test_images, size=128),
    "cifar10-train": Source(
        "CIFAR-10 train, 128 px (first 10,000; 10)", "cifar10.npz", _read_training_images, size=128
    ),
    **{name: Source(title, size=224, collection=name) for name, title in _PAPER_SETS.items()},
}


def _wanted() -> str:
    files = sorted({source.file for source in SOURCES.values() if source.file is not None})
    sets = ", ".join(source.collection for source in SOURCES.values() if source.collection is not None)
    return f"at least one of {', '.join(files)}" + (
        f", or of the paper's sets {sets} in the form that they are published in; ssmkernels.data.load_collection says"
        " of each what it looks for and where to get it"
        if sets
        else ""
    )
