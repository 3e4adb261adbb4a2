# SPDX-License-Identifier: BSD-3-Clause
"""Real images as features for propagation: pixels of those inside packages, principal components of the pixels of
glyphs, features of a network of photographs.

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
from ssmkernels.experiments.sources import INSIDE_PACKAGES


class FeatureSet(NamedTuple):
    features: Tensor
    """[N, d] float32."""
    labels: Tensor
    """[N] int64."""


class Archive(NamedTuple):
    """A packed archive in the folder of the data."""

    file: str
    rows: slice
    """Which of its images."""
    size: int
    """Side of the squares that the network sees."""


BN_INCEPTION = "bn_inception-52deb4733.pth"
ARCHIVES = {
    "flowers17": Archive("flowers17.npz", slice(None), 224),
    "cifar10-test": Archive("cifar10.npz", slice(-10_000, None), 128),
    "cifar10-train": Archive("cifar10.npz", slice(10_000), 128),
}
"""The sets of archives; what else is not inside packages :func:`ssmkernels.data.load_collection` reads by its name."""
GLYPHS = {"glyphs-10k": 10_000, "glyphs": None}
"""How many images of glyphs.npz, drawn at random, are in a set; None for all."""
COMPONENTS = 64
"""Principal components of their pixels."""


def available(names: Iterable[str], folder: str | None) -> list[str]:
    """Which of the sets ``names`` can be had: those inside packages, and those of which the images are in ``folder``.

    Raises:
        FileNotFoundError: there are none in ``folder``; it says what was looked for.
        ValueError: a set in ``folder`` is damaged.
    """
    others = [name for name in names if name not in INSIDE_PACKAGES]
    there = [name for name in others if folder is not None and _is_there(name, Path(folder))]
    if folder is not None and not there:
        files = sorted({_archive_file(name) for name in others if name in ARCHIVES or name in GLYPHS})
        collections = [name for name in others if name not in ARCHIVES and name not in GLYPHS]
        raise FileNotFoundError(
            f"--data is {folder!r}; it should have at least one of {', '.join(files)}, or of the paper's sets"
            f" {', '.join(collections)} in the form that they are published in; ssmkernels.data.load_collection says of"
            " each what it looks for and where to get it"
        )
    return [name for name in names if name in INSIDE_PACKAGES or name in there]


def _is_there(name: str, folder: Path) -> bool:
    if name in ARCHIVES or name in GLYPHS:
        return (folder / _archive_file(name)).is_file()
    try:
        data.load_collection(name, folder)
    except FileNotFoundError:
        return False
    return True


def _archive_file(name: str) -> str:
    return ARCHIVES[name].file if name in ARCHIVES else "glyphs.npz"


def network_of(folder: str | None) -> str:
    """The network of the paper's sets in ``folder``."""
    return "bn-inception" if folder is not None and (Path(folder) / BN_INCEPTION).is_file() else "efficientnet-lite0"


def load(name: str, folder: str | None, cache: Path) -> FeatureSet:
    """The set ``name``; features of a network are kept in ``cache`` and made once."""
    if name in INSIDE_PACKAGES:
        images = data.load_collection(name).images
        pixels = np.stack([np.asarray(images.image(i), dtype=np.float32).ravel() for i in range(len(images))])
        return FeatureSet(torch.from_numpy(pixels), torch.from_numpy(images.labels))
    if name in GLYPHS:
        return _components(Path(folder or "."), GLYPHS[name])
    archive = ARCHIVES.get(name)
    backbone = network_of(folder) if archive is None else "efficientnet-lite0"
    kept = cache / f"{name}-{backbone if archive is None else f'{archive.size}px'}.npz"
    if not is_whole(kept):
        images, batches = _batches(name, backbone, Path(folder or "."))
        print(f"{name}: {backbone} features of {len(images)} images", flush=True)
        weights = Path(folder or ".") / BN_INCEPTION if backbone == "bn-inception" else "imagenet"
        network = models.build_embedding_model(backbone, 1, weights=weights, pooling="avg")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        features = models.extract_features(network.to(memory_format=torch.channels_last), batches, device=device)
        with checksummed_archive(kept) as file:
            np.savez(file, features=features.numpy(), labels=images.labels)
    with np.load(kept) as arrays:
        return FeatureSet(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]))


def _components(folder: Path, count: int | None) -> FeatureSet:
    """The pixels of ``count`` glyphs, centred, in the basis of their first principal components."""
    collection = data.load_collection("glyphs", folder)
    images, labels = collection.images, torch.from_numpy(collection.images.labels)
    chosen = torch.arange(len(labels))
    if count is not None:
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    pixels = torch.from_numpy(np.stack([np.asarray(images.image(i)).ravel() for i in chosen.tolist()])).float()
    pixels -= pixels.mean(dim=0)
    axes = torch.linalg.eigh(pixels.T @ pixels).eigenvectors[:, -COMPONENTS:]
    return FeatureSet(pixels @ axes, labels[chosen])


def _batches(name: str, backbone: str, folder: Path) -> tuple[data.ImageDataset, Iterable[Any]]:
    """The images of a set, and batches of them: those of an archive squeezed into squares, others as the network's
    evaluation has them.
    """
    if name not in ARCHIVES:
        collection = data.load_collection(name, folder)
        views = data.retrieval_views(collection, models.preprocessing(backbone), size=224)
        return collection.images, data.evaluation_batches(
            collection.images, 128, mean=views.mean, std=views.std, transform=views.evaluation
        )
    file, rows, size = ARCHIVES[name]
    packed = data.load_collection("npz", folder / file).images
    index = np.arange(len(packed))[rows]
    pictures = [packed.image(i).resize((size, size), Image.Resampling.BILINEAR) for i in index]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    images = data.ArrayImages(pixels, packed.labels[index], packed.num_classes)
    mean, std, _ = data.NORMALIZATIONS[str(models.preprocessing(backbone))]
    return images, data.evaluation_batches(images, 64, mean=mean, std=std)
