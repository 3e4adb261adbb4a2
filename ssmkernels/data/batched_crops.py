# SPDX-License-Identifier: BSD-3-Clause
"""Views of photographs in two parts: loading processes cut a random crop out of each and resize it, the device of
training flips, distorts and blurs the uint8 crops of a batch.

The counterparts of :class:`ssmkernels.data.augment.ImageNetWeak` and :class:`ssmkernels.data.augment.MoCoV2`, with the
same distribution of every parameter. All numbers of a view are drawn at once from (seed, stream, step, position), see
:func:`ssmkernels.data.philox.uniforms`: its first :data:`CROP_DRAWS` are those of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ssmkernels.data import batched_colour
from ssmkernels.data.augment import ImageNetWeak, MoCoV2
from ssmkernels.data.batched_augment import normalize
from ssmkernels.data.batched_ops import blocks, empty_batch
from ssmkernels.data.decoding import Photograph
from ssmkernels.data.images import ImageDataset

ATTEMPTS = 10
"""To find a crop inside the image."""
CROP_DRAWS = 4 * ATTEMPTS
"""Of each attempt: the share of the area, the aspect, how far to the right and how far down."""
LEAST_ASPECT, GREATEST_ASPECT = 3 / 4, 4 / 3


@runtime_checkable
class CropTransform(Protocol):
    """What the device does to the crops [n, C, size, size] uint8 of a batch, by [n, num_draws] numbers in [0, 1)."""

    size: int
    scale: tuple[float, float]
    num_draws: int
    order: str
    """Of three channels, "RGB" or "BGR", or "native" for those of the images as they are."""

    def __call__(self, crops: Tensor, draws: np.ndarray) -> Tensor: ...


class BatchImageNetWeak:
    """:class:`ssmkernels.data.augment.ImageNetWeak`: a random crop and a flip.

    Args:
        size, scale, flip: its settings.
        order: of the channels, "RGB", "BGR" or "native".
    """

    num_draws = CROP_DRAWS + 1

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        *,
        order: str = "native",
    ) -> None:
        self.settings = ImageNetWeak(size, scale, flip)
        self.size, self.scale, self.order = size, scale, order

    def __call__(self, crops: Tensor, draws: np.ndarray) -> Tensor:
        if not self.settings.flip:
            return crops
        views = crops.clone(memory_format=torch.contiguous_format)
        batched_colour.flip_(views, draws[:, CROP_DRAWS] < 0.5)
        return views


class BatchMoCoV2:
    """:class:`ssmkernels.data.augment.MoCoV2`: a random crop, a flip, colour jitter, greyscale, blur.

    Args:
        size, scale, flip, jitter, blur: its settings.
        order: of the channels, "RGB", "BGR" or "native".
    """

    num_draws = CROP_DRAWS + 13

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        *,
        flip: bool = True,
        jitter: float = 0.4,
        blur: float = 2.0,
        order: str = "native",
    ) -> None:
        self.settings = MoCoV2(size, scale, flip=flip, jitter=jitter, blur=blur)
        self.size, self.scale, self.order = size, scale, order

    def __call__(self, crops: Tensor, draws: np.ndarray) -> Tensor:
        views = crops.clone(memory_format=torch.contiguous_format)
        if self.settings.crop.flip:
            batched_colour.flip_(views, draws[:, CROP_DRAWS] < 0.5)
        batched_colour.jitter_(views, *self.jitter(draws))
        batched_colour.grey_(views, draws[:, CROP_DRAWS + 10] < 0.2)
        if self.settings.blur:
            batched_colour.blur_(views, self.sigmas(draws), self.settings.blur)
        return views

    def jitter(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order, factors and turns, see :func:`ssmkernels.data.batched_colour.jitter_`."""
        jittered, places, factors, turn = np.split(draws[:, CROP_DRAWS + 1 : CROP_DRAWS + 10], (1, 5, 8), axis=1)
        strength = self.settings.jitter
        order = np.where(jittered < 0.8, places.argsort(axis=1), -1)
        return order, 1 + strength * (2 * factors - 1), strength / 4 * (2 * turn[:, 0] - 1)

    def sigmas(self, draws: np.ndarray) -> np.ndarray:
        """σ of the blur, 0 for none."""
        whether, which = draws[:, CROP_DRAWS + 11 : CROP_DRAWS + 13].T
        return np.where(whether < 0.5, 0.1 + (self.settings.blur - 0.1) * which, 0.0)


def random_boxes(sizes: np.ndarray, scale: tuple[float, float], draws: np.ndarray) -> np.ndarray:
    """Crops of random area and aspect (3/4 to 4/3): left, top, right and bottom, [n, 4] int64.

    Args:
        sizes: [n, 2], width and height of the images in pixels.
        scale: least and greatest share of the area.
        draws: [n, ≥ CROP_DRAWS] numbers in [0, 1). The first attempt that fits counts, and where none does the centre,
            as wide or as high as the aspects allow.
    """
    width, height = sizes.T[:, :, None]
    share, aspect, right, down = draws[:, :CROP_DRAWS].reshape(-1, ATTEMPTS, 4).transpose(2, 0, 1)
    area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
    least, greatest = math.log(LEAST_ASPECT), math.log(GREATEST_ASPECT)
    ratio = np.exp(least + (greatest - least) * aspect)
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    lefts, tops = np.floor(right * (width - widths + 1)), np.floor(down * (height - heights + 1))
    attempts = np.stack([lefts, tops, lefts + widths, tops + heights], axis=2).astype(np.int64)
    boxes = attempts[np.arange(len(sizes)), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1)[:, None], boxes, _central_boxes(sizes))


def _central_boxes(sizes: np.ndarray) -> np.ndarray:
    width, height = sizes.T
    widths = np.minimum(width, np.rint(height * GREATEST_ASPECT).astype(np.int64))
    heights = np.minimum(height, np.rint(width * GREATEST_ASPECT).astype(np.int64))
    left, top = (width - widths) // 2, (height - heights) // 2
    return np.stack([left, top, left + widths, top + heights], axis=1)


def random_crops(
    dataset: ImageDataset, index: np.ndarray, views: Sequence[tuple[CropTransform, np.ndarray]]
) -> list[Tensor]:
    """The crops of every view of some images, which are decoded once: [V·n, C, size, size] uint8 for each.

    Args:
        index: [n], which images.
        views: transforms with their draws [V·n, num_draws], the first view of all images, then the second one, …
    """
    count = len(index)
    photographs = [Photograph(dataset, i) for i in index]
    for photograph, i in zip(photographs, index, strict=True):
        if photograph.channels != photographs[0].channels:
            raise ValueError(
                f"image {i} has {photograph.channels} channels and image {index[0]} has {photographs[0].channels}; the"
                " images of a batch should have the same"
            )
    sizes = np.array([photograph.size for photograph in photographs])
    boxes = [random_boxes(np.resize(sizes, (len(draws), 2)), view.scale, draws) for view, draws in views]
    # Channels last, as decoders and resizing have them: the device rearranges them, faster than a loading process.
    shapes = [(len(draws), view.size, view.size, photographs[0].channels) for view, draws in views]
    crops = [empty_batch(shape, torch.uint8, torch.device("cpu")) for shape in shapes]
    for number, photograph in enumerate(photographs):
        photograph.cut(
            [box for of_view in boxes for box in of_view[number::count]],
            [square for of_view in crops for square in of_view[number::count]],
        )
    return [of_view.permute(0, 3, 1, 2) for of_view in crops]


def finished_views(
    crops: Tensor, transform: CropTransform, draws: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What a network sees of the crops [n, C, size, size] uint8: float32, normalised, on their device.

    Args:
        draws: [n, num_draws], those that the crops were cut by.
        mean, std: per channel, in the order of the transform.
    """
    views = transform(crops, draws)
    if transform.order != "native":
        views = views.expand(-1, 3, -1, -1)
    if transform.order == "BGR":
        views = views.flip(1)
    normalized = empty_batch(views.shape, torch.float32, views.device)
    for block in blocks(len(views), views[:1].numel(), views.device):
        normalized[block] = normalize(views[block], mean, std)
    return normalized
