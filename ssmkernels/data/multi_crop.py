# SPDX-License-Identifier: BSD-3-Clause
"""Multi-crop (SwAV, Caron et al., NeurIPS 2020, section 3.2): two large crops of an image and several small ones,
all distorted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssmkernels.data.augment import MoCoV2, Transform, to_tensors
from ssmkernels.data.batched_crops import BatchMoCoV2, CropTransform, finished_views, random_crops
from ssmkernels.data.batches import check_steps
from ssmkernels.data.images import ImageDataset
from ssmkernels.data.philox import uniforms
from ssmkernels.data.retrieval import ImageCollection, MeanAndStd, _normalization, _TrainingView
from ssmkernels.data.streams import IndexStream, Stream, generator


class CropViews(NamedTuple):
    """Transforms of the crops, and the ``mean`` and ``std`` (in the order of the channels that they give) to make
    tensors with.
    """

    large: Transform | CropTransform
    small: Transform | CropTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]


def crop_views(
    collection: ImageCollection,
    normalization: str | MeanAndStd = "imagenet",
    *,
    size: int,
    small_size: int,
    scale: tuple[float, float] = (0.14, 1.0),
    small_scale: tuple[float, float] = (0.05, 0.14),
    jitter: float = 0.8,
    blur: float = 2.0,
    batched: bool = False,
) -> CropViews:
    """SwAV's views: random crops, flipped where the collection may be, with SimCLR's distortion of colours (Chen et
    al., 2020), and blur.

    Args:
        collection: the images.
        normalization: as in :func:`ssmkernels.data.retrieval_views`.
        size, small_size: sides of the two kinds of crops in pixels.
        scale, small_scale: least and greatest share of the image's area that they cover.
        jitter: largest change of brightness, contrast and saturation; that of the hue, as a share of the circle, is a
            quarter of it.
        blur: greatest σ in pixels; 0 for no blur.
        batched: make the views in two parts, see :mod:`ssmkernels.data.batched_crops`, instead of image by image by
            Pillow.
    """
    for name, side in (("size", size), ("small_size", small_size)):
        if side < 1:
            raise ValueError(f"{name} is {side}; it should be at least 1")
    mean, std, order = _normalization(collection, normalization)
    flip = collection.augmentation in ("imagenet", "crop-flip")
    settings: dict[str, Any] = {"flip": flip, "jitter": jitter, "blur": blur}
    kinds = ((size, scale), (small_size, small_scale))
    large: Transform | CropTransform
    small: Transform | CropTransform
    if batched:
        large, small = (BatchMoCoV2(side, share, order=order, **settings) for side, share in kinds)
    else:
        large, small = (_TrainingView(MoCoV2(side, share, **settings), order) for side, share in kinds)
    return CropViews(large, small, mean, std)


class MultiCropBatch(NamedTuple):
    """Crops of B images."""

    large: Tensor
    """[2B, C, H, W] float32: the first crops of all images, then the second ones."""
    small: Tensor
    """[V·B, C, h, w] float32: V more crops of all images, in the same order; empty if V is 0."""
    positions: Tensor
    """[B] int64, places of the images in the data set."""


class MultiCropBatches(Dataset[MultiCropBatch]):
    """As :class:`ssmkernels.data.CollectionBatches`, with several crops of each image.

    Args:
        images: where the images come from; all are drawn, in seeded shuffles.
        views: see :func:`crop_views`.
        num_small: V ≥ 0, small crops of an image beside its two large ones.
        batch_size: B, images of a step, all ranks together.
        seed: seed of order and augmentation.
        start_step: the first step.
        num_steps: one past the last step.
        rank, world_size: which slice of the batch is wanted, and how many there are.
    """

    def __init__(
        self,
        images: ImageDataset,
        views: CropViews,
        *,
        num_small: int = 6,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_small < 0:
            raise ValueError(f"num_small is {num_small}; it should be at least 0")
        check_steps(batch_size, start_step, num_steps, rank, world_size)
        self.images, self.views, self.num_small = images, views, num_small
        self.batch_size, self.seed, self.start_step, self.num_steps = batch_size, seed, start_step, num_steps
        share = batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)
        self._order = IndexStream(len(images), seed, stream=Stream.COLLECTION_ORDER)

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __getitem__(self, item: int) -> MultiCropBatch:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} batches")
        step = self.start_step + item
        positions = self._order.batch(step, self.batch_size)[self._mine]
        if self.cropped:
            return self._random_crops(positions, step)
        images = [self.images.image(i) for i in positions]
        large = self._crops(images, self.views.large, range(2), step)
        small = self._crops(images, self.views.small, range(2, 2 + self.num_small), step)
        return MultiCropBatch(large, small, torch.from_numpy(positions))

    @property
    def cropped(self) -> bool:
        """Whether batches have crops, uint8, of which :meth:`finish` makes views."""
        return isinstance(self.views.large, CropTransform)

    def finish(self, batch: MultiCropBatch, step: int) -> MultiCropBatch:
        """The batch of a step with views instead of crops, made on the device where it is."""
        views = [
            finished_views(crops, transform, draws, self.views.mean, self.views.std)
            for crops, (transform, draws) in zip((batch.large, batch.small), self._kinds(step), strict=False)
        ]
        return batch._replace(large=views[0], small=views[1] if self.num_small else batch.small.float())

    def _random_crops(self, positions: np.ndarray, step: int) -> MultiCropBatch:
        crops = random_crops(self.images, positions, self._kinds(step))
        small = crops[1] if self.num_small else torch.empty(0, dtype=torch.uint8)
        return MultiCropBatch(crops[0], small, torch.from_numpy(positions))

    def _kinds(self, step: int) -> list[tuple[Any, np.ndarray]]:
        """Large and, where there are any, small crops: how they are made, and the draws of all of them."""
        kinds: list[tuple[Any, np.ndarray]] = [(self.views.large, self._draws(range(2), step))]
        if self.num_small:
            kinds.append((self.views.small, self._draws(range(2, 2 + self.num_small), step)))
        return kinds

    def _draws(self, numbers: range, step: int) -> np.ndarray:
        transform: Any = self.views.large if numbers.start < 2 else self.views.small
        firsts = self.batch_size * np.array(numbers)[:, None]
        places = (firsts + np.arange(self._mine.start, self._mine.stop)).ravel()
        return uniforms(self.seed, Stream.MULTI_CROP, step, places, transform.num_draws)

    def _crops(self, images: list[Image.Image], transform: Any, numbers: range, step: int) -> Tensor:
        if len(numbers) == 0:
            return torch.empty(0)
        crops = [
            transform(image, generator(self.seed, Stream.MULTI_CROP, step, (number << 32) + place))
            for number in numbers
            for place, image in enumerate(images, start=self._mine.start)
        ]
        return to_tensors(crops, self.views.mean, self.views.std)
