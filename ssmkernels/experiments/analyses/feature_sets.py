# SPDX-License-Identifier: BSD-3-Clause
"""Real images as features for propagation: pixels of those inside packages, features of a network of those in a folder.

The network of the paper's sets is BN-Inception where its weights are in the folder, as in the paper, and else
EfficientNet-Lite0.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmkernels import data, models
from ssmkernels._files import checksummed_archive, is_whole
from ssmkernels.data.packed import packed_images
from ssmkernels.experiments.sources import INSIDE_PACKAGES


class FeatureSet(NamedTuple):
    features: Tensor
    """[N, d] float32."""
    labels: Tensor
    """[N] int64."""


class Source(NamedTuple):
    """Where a set comes from: a packed archive in the folder of the data, or else what
    :func:`ssmkernels.data.load_collection` reads by the set's name.
    """

    title: str
    archive: str | None = None
    first: int | str = 0
    """Of the archive's images, or the array that says which."""
    last: int | None = None
    size: int = 224
    """Side of the images that the network sees."""


BN_INCEPTION = "bn_inception-52deb4733.pth"
SOURCES = {
    "digits": Source("digits, pixels (1,797; 10 classes)"),
    "mnist5k": Source("MNIST-5k, pixels (5,000; 10)"),
    "flowers17": Source("17-flowers, 224 px (1,360; 17)", "flowers17.npz"),
    "cifar10-test": Source("CIFAR-10 test, 128 px (10,000; 10)", "cifar10.npz", first="n_train", size=128),
    "cifar10-train": Source("CIFAR-10 train, 128 px (first 10,000; 10)", "cifar10.npz", last=10_000, size=128),
}
SMALL_SETS = tuple(SOURCES)
PAPER_SETS = {
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
SOURCES |= {name: Source(title) for name, title in PAPER_SETS.items()}


def available(folder: str | None) -> list[str]:
    """The sets that can be had: those inside packages, and those of which the images are in ``folder``.

    Raises:
        FileNotFoundError: there are none in ``folder``; it says what was looked for.
        ValueError: a set in ``folder`` is damaged.
    """
    if folder is None:
        return [name for name in SOURCES if name in INSIDE_PACKAGES]
    archives = sorted({source.archive for source in SOURCES.values() if source.archive is not None})
    wanted = (
        f"at least one of {', '.join(archives)}, or of the paper's sets {', '.join(PAPER_SETS)} in the form that they"
        " are published in; ssmkernels.data.load_collection says of each what it looks for and where to get it"
    )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--data is {folder!r}, which is no folder; it should have {wanted}")
    in_folder = [name for name in SOURCES if name not in INSIDE_PACKAGES and _is_there(name, Path(folder))]
    if not in_folder:
        raise FileNotFoundError(f"--data is {folder!r}; it should have {wanted}")
    return [name for name in SOURCES if name in INSIDE_PACKAGES or name in in_folder]


def _is_there(name: str, folder: Path) -> bool:
    archive = SOURCES[name].archive
    if archive is not None:
        return (folder / archive).is_file()
    try:
        data.load_collection(name, folder)
    except FileNotFoundError:
        return False
    return True


def network_of(folder: str | None) -> str:
    """The network of the paper's sets in ``folder``."""
    return "bn-inception" if folder is not None and (Path(folder) / BN_INCEPTION).is_file() else "efficientnet-lite0"


def load(name: str, folder: str | None, cache: Path) -> FeatureSet:
    """The set ``name``; features of a network are kept in ``cache`` and made once."""
    source = SOURCES[name]
    if name in INSIDE_PACKAGES:
        images = data.load_collection(name).images
        pixels = np.stack([np.asarray(images.image(i), dtype=np.float32).ravel() for i in range(len(images))])
        return FeatureSet(torch.from_numpy(pixels), torch.from_numpy(images.labels))
    backbone = "efficientnet-lite0" if source.archive is not None else network_of(folder)
    kept = cache / f"{name}-{backbone if source.archive is None else f'{source.size}px'}.npz"
    if not is_whole(kept):
        images, batches = _batches(name, source, backbone, Path(folder or "."))
        print(f"{source.title}: {backbone} features of {len(images)} images", flush=True)
        weights = Path(folder or ".") / BN_INCEPTION if backbone == "bn-inception" else "imagenet"
        network = models.build_embedding_model(backbone, 1, weights=weights, pooling="avg")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        features = models.extract_features(network.to(memory_format=torch.channels_last), batches, device=device)
        with checksummed_archive(kept) as file:
            np.savez(file, features=features.numpy(), labels=images.labels)
    with np.load(kept) as arrays:
        return FeatureSet(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]))


def _batches(name: str, source: Source, backbone: str, folder: Path) -> tuple[data.ImageDataset, Iterable[Any]]:
    """The images of a set, and batches of them: those of an archive squeezed into squares, others as the network's
    evaluation has them.
    """
    if source.archive is None:
        collection = data.load_collection(name, folder)
        views = data.retrieval_views(collection, models.preprocessing(backbone), size=source.size)
        return collection.images, data.evaluation_batches(
            collection.images, 128, mean=views.mean, std=views.std, transform=views.evaluation
        )
    with np.load(folder / source.archive, allow_pickle=False) as archive:
        first = source.first if isinstance(source.first, int) else int(archive[source.first])
        pictures, labels = packed_images(archive, slice(first, source.last))
    square = (source.size, source.size)
    pixels = np.stack([np.asarray(picture.resize(square, Image.Resampling.BILINEAR)) for picture in pictures])
    images = data.ArrayImages(pixels, labels, int(labels.max()) + 1)
    mean, std, _ = data.NORMALIZATIONS[str(models.preprocessing(backbone))]
    return images, data.evaluation_batches(images, 64, mean=mean, std=std)
