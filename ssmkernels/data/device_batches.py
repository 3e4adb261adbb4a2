# SPDX-License-Identifier: BSD-3-Clause
"""Training batches of images that are held on the device of training, augmented there too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmkernels.data.batched_augment import normalize
from ssmkernels.data.batched_ops import to_device
from ssmkernels.data.batches import TrainBatches
from ssmkernels.data.images import ArrayImages, ImageDataset
from ssmkernels.data.retrieval import ImageSubset


class DevicePixels:
    """A copy of all pixels of a data set on a device, uint8.

    Args:
        dataset: images of one size and mode; those of files are decoded.
        device: where to hold them.

    Raises:
        ValueError: the images are of several sizes or modes.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device) -> None:
        pixels = pixels_of(dataset)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        self.pixels = torch.from_numpy(np.array(pixels, order="C")).to(device)  # [N, C, H, W]

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """Some images, [B, C, H, W] uint8, without waiting for the device."""
        return self.pixels.index_select(0, to_device(index, self.pixels))


def pixels_of(dataset: ImageDataset) -> np.ndarray:
    """[N, H, W] or [N, H, W, 3] uint8."""
    if isinstance(dataset, ArrayImages):
        return dataset.images
    if isinstance(dataset, ImageSubset):
        return pixels_of(dataset.dataset)[dataset.index]
    images = [np.asarray(dataset.image(i)) for i in range(len(dataset))]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(
            f"images are of {len(shapes)} shapes; they should be of one to be augmented in batches, or augmented by"
            " Pillow, data.augment pil"
        )
    return np.stack(images)


class DeviceTrainBatches(TrainBatches):
    """:class:`TrainBatches` whose images are on ``device`` and augmented there, by the transforms of
    :func:`ssmkernels.data.batch_transforms`. Iterating gives the batches in their order; no loading process is needed.

    A view is a function of (seed, step, its position in the batch of all ranks). Order and images are those of
    :class:`TrainBatches`; so is the distribution of the views, whose draws are others.
    """

    def __init__(self, *args: Any, device: torch.device, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pixels = {id(self.labeled): DevicePixels(self.labeled, device)}
        if self.mu and self.unlabeled is not self.labeled:
            self.pixels[id(self.unlabeled)] = DevicePixels(self.unlabeled, device)

    def _views(self, dataset: ImageDataset, index: np.ndarray, names: Sequence[str], step: int) -> list[Tensor]:
        images = self.pixels[id(dataset)][index]
        views = [self._transform(name)(images, self._draws(name, len(index), step)) for name in names]
        return [normalize(view, self.mean, self.std) for view in views]
