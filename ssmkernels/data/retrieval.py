# SPDX-License-Identifier: BSD-3-Clause
"""Collections for image retrieval: class-disjoint splits, and the views that networks are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from ssmkernels.data.augment import EvaluationTransform, ImageNetWeak, ResizeCenterCrop, Transform, Weak
from ssmkernels.data.batched_crops import BatchImageNetWeak, CropTransform
from ssmkernels.data.images import ImageDataset, file_of
from ssmkernels.data.readers import IMAGENET_MEAN, IMAGENET_STD
from ssmkernels.data.streams import Stream, generator

MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]
CROP_SCALE = (0.08, 1.0)
"""Share of the image that a training crop covers: what torchvision's RandomResizedCrop does by default."""


@dataclass(frozen=True)
class ImageCollection:
    """All images of a data set, with their classes.

    Args:
        images: N images with labels.
        class_names: of the L classes.
        mean, std: per channel, of pixels scaled to [0, 1].
        image_size: side of the square images that a network sees by default.
        augmentation: which training views are natural at that size: "imagenet" crops photographs of any size at random
            and flips them, "imagenet-no-flip" does not flip; "crop" and "crop-flip" shift small images that all have
            this size.
        queries: [N] bool, the images that retrieval is asked for among the others (In-shop's queries and gallery); None
            where each image is asked for among all others.
    """

    images: ImageDataset
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 224
    augmentation: Literal["imagenet", "imagenet-no-flip", "crop", "crop-flip"] = "imagenet"
    queries: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray:
        """[N] int64, in [0, num_classes)."""
        return self.images.labels

    @property
    def num_classes(self) -> int:
        return self.images.num_classes

    @property
    def channels(self) -> int:
        return len(self.mean)


class ImageSubset:
    """Some images of another data set, with labels of their own.

    Args:
        dataset: where the images come from.
        index: [N] which of them.
        labels: [N] integers in [0, num_classes).
        num_classes: number of classes L.
    """

    def __init__(self, dataset: ImageDataset, index: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
        self.dataset, self.index, self.labels, self.num_classes = dataset, index, labels, num_classes

    def __len__(self) -> int:
        return len(self.index)

    def image(self, index: int) -> Image.Image:
        return self.dataset.image(self.index[index])

    def path(self, index: int) -> str | None:
        return file_of(self.dataset, self.index[index])


def split_classes(
    num_classes: int, *, fractions: tuple[float, float, float] = (0.4, 0.2, 0.4), seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes to train, validate and test on, disjoint and drawn at random: three sorted int64 arrays.

    Training and test sets get their fraction of the classes, rounded to the nearest (halves to the even one);
    validation gets the rest.

    Args:
        num_classes: number of classes L, at least 3.
        fractions: of the classes to train, validate and test on; their sum is 1. That to validate on may be 0.
        seed: seed of the draw.
    """
    positive = len(fractions) == 3 and min(fractions[0], fractions[2]) > 0 and fractions[1] >= 0
    if not positive or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions is {fractions}; it should be three positive numbers with a sum of 1, the second one may be 0"
        )
    num_train = round(fractions[0] * num_classes)
    num_test = round(fractions[2] * num_classes) if fractions[1] else num_classes - num_train
    if min(num_train, num_test) < 1 or num_classes - num_train - num_test < (fractions[1] > 0):
        raise ValueError(
            f"num_classes is {num_classes}, which fractions, {fractions}, split into {num_train},"
            f" {num_classes - num_train - num_test} and {num_test}; each part should have at least one"
        )
    order = generator(seed, Stream.CLASSES).permutation(num_classes)
    train, validation, test = np.split(order, [num_train, num_classes - num_test])
    return np.sort(train), np.sort(validation), np.sort(test)


def class_subset(collection: ImageCollection, classes: Sequence[int] | np.ndarray) -> ImageCollection:
    """The images of some classes, in their order; class ``classes[i]`` becomes class i.

    Args:
        collection: the images.
        classes: distinct integers in [0, collection.num_classes).
    """
    classes = np.asarray(classes)
    if (
        classes.ndim != 1
        or classes.dtype.kind not in "iu"
        or len(classes) == 0
        or len(np.unique(classes)) < len(classes)
    ):
        raise ValueError(f"classes is {classes.tolist()}; it should be a list of distinct integers, not empty")
    if classes.min() < 0 or classes.max() >= collection.num_classes:
        raise ValueError(
            f"classes are in [{classes.min()}, {classes.max()}]; they should be in [0, {collection.num_classes})"
        )
    number = np.full(collection.num_classes, -1, dtype=np.int64)
    number[classes] = np.arange(len(classes))
    labels = np.where(collection.labels < 0, -1, number[collection.labels])
    index = np.flatnonzero(labels >= 0)
    images = ImageSubset(collection.images, index, labels[index], len(classes))
    names = tuple(collection.class_names[i] for i in classes)
    return replace(take(collection, index), images=images, class_names=names)


def take(collection: ImageCollection, index: np.ndarray) -> ImageCollection:
    """The images at the positions ``index`` [n], of the classes that they are of."""
    images = ImageSubset(collection.images, index, collection.labels[index], collection.num_classes)
    queries = None if collection.queries is None else collection.queries[index]
    return replace(collection, images=images, queries=queries)


def first_images(collection: ImageCollection, count: int) -> ImageCollection:
    """The first ``count`` images of each class, or all where there are fewer."""
    if count < 1:
        raise ValueError(f"count is {count}; it should be at least 1")
    labels = collection.labels
    index = np.sort(
        np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(collection.num_classes)])
    )
    return take(collection, index)


class Normalization(NamedTuple):
    """Pixels as a network takes them: channels in ``order``, then (pixel / 255 − mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Literal["RGB", "BGR", "native"] = "RGB"


NORMALIZATIONS = {
    "imagenet": Normalization(IMAGENET_MEAN, IMAGENET_STD),
    "bgr-caffe": Normalization((104 / 255, 117 / 255, 128 / 255), (1 / 255,) * 3, "BGR"),  # pixel − mean, nothing else
    "half": Normalization((127 / 255,) * 3, (128 / 255,) * 3),  # (pixel − 127) / 128
}


class RetrievalViews(NamedTuple):
    """Transforms, and the ``mean`` and ``std`` (in the order of the channels that the transforms give) to make tensors
    with.

    ``evaluation`` is None where images are taken as they are.
    """

    training: Transform | CropTransform
    evaluation: EvaluationTransform | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def retrieval_views(
    collection: ImageCollection,
    normalization: str | MeanAndStd = "imagenet",
    *,
    size: int | None = None,
    resize: int | None = None,
    crop_scale: tuple[float, float] = CROP_SCALE,
    batched: bool = False,
) -> RetrievalViews:
    """Views of photographs: a random crop resized to ``size`` and flipped to train on; shorter side to ``resize``, then
    the central square, to evaluate on. Small images at their own size are shifted by up to an eighth, and evaluated as
    they are.

    The protocol of Musgrave et al. (ECCV 2020) is ``size=227, resize=256, crop_scale=(0.16, 1.0)``.

    Args:
        collection: the images.
        normalization: "imagenet", "bgr-caffe" or "half", each of three channels, as
            :func:`ssmkernels.models.preprocessing` says; or the mean and the deviation of three channels, RGB; or
            "native": by the collection's own mean and deviation, with its own channels.
        size: side of the views in pixels, by default ``collection.image_size``.
        resize: shorter side of an evaluated photograph before its centre is cut out, by default 8/7 · ``size`` (256 for
            224).
        crop_scale: least and greatest share of a photograph that a training crop covers.
        batched: make the training views of photographs in two parts, see :mod:`ssmkernels.data.batched_crops`, instead
            of image by image by Pillow.
    """
    mean, std, order = _normalization(collection, normalization)
    size = collection.image_size if size is None else size
    if size < 1:
        raise ValueError(f"size is {size}; it should be at least 1")
    flip = collection.augmentation in ("imagenet", "crop-flip")
    if collection.augmentation in ("crop", "crop-flip") and size == collection.image_size:
        as_they_are = None if order == "native" else EvaluationView(None, order)
        return RetrievalViews(_TrainingView(Weak(size, size // 8, flip), order), as_they_are, mean, std)
    evaluation = ResizeCenterCrop(round(size * 256 / 224) if resize is None else resize, size)
    training: Any = _TrainingView(ImageNetWeak(size, crop_scale, flip), order)
    if batched:
        training = BatchImageNetWeak(size, crop_scale, flip, order=order)
    return RetrievalViews(training, EvaluationView(evaluation, order), mean, std)


def _normalization(collection: ImageCollection, name: str | MeanAndStd) -> Normalization:
    if not isinstance(name, str):
        return Normalization(*name, "RGB")
    if name not in (*NORMALIZATIONS, "native"):
        raise ValueError(f"normalization is {name!r}; it should be one of {', '.join(NORMALIZATIONS)}, native")
    return NORMALIZATIONS.get(name, Normalization(collection.mean, collection.std, "native"))


@dataclass(frozen=True)
class _TrainingView:
    crop: Transform
    order: str

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return reordered(self.crop(image, rng), self.order)


@dataclass(frozen=True)
class EvaluationView:
    """The centre of an image, or all of it, with its channels in an order."""

    crop: EvaluationTransform | None
    order: str

    def __call__(self, image: Image.Image) -> Image.Image:
        return reordered(image if self.crop is None else self.crop(image), self.order)


def reordered(image: Image.Image, order: str) -> Image.Image:
    if order == "native":
        return image
    image = image.convert("RGB")
    return image if order == "RGB" else Image.merge("RGB", image.split()[::-1])
