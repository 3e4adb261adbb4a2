# SPDX-License-Identifier: BSD-3-Clause
"""The views of training steps, made in batches, by Pillow and by torchvision.transforms.v2, for the benchmarks.

Small images are noise, which costs what photographs cost: no operation looks at them. Photographs are made, 500 by 375
pixels and about 80 KB (ImageNet's have 110 on average), written as JPEG and read from the page cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssmkernels import data

MEAN, STD = (0.5,) * 3, (0.25,) * 3
NAMES = tuple("0123456789")
STEPS = 2**40  # that a run of the batches has


class Ways(NamedTuple):
    """The batches of a step by its number."""

    pil: Any
    batched: Any


def small_images(count: int = 50_000) -> data.ImageSplits:
    """CIFAR-10's size and number."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = data.ArrayImages(pixels, np.arange(count) % 10, 10)
    return data.ImageSplits(images, images, 10, NAMES, MEAN, STD, image_size=32)


def small_batches(splits: data.ImageSplits, variant: str, batch_size: int, device: str = "cpu") -> Ways:
    """SimMatch's of small images, μ = 7."""
    of_pillow = data.default_transforms(splits, variant=variant)
    of_batches: Any = data.batch_transforms(splits, variant=variant)
    options: dict[str, Any] = {"batch_size": batch_size, "mu": 7, "seed": 1, "start_step": 0, "num_steps": STEPS}
    options |= {"mean": splits.mean, "std": splits.std}
    arguments = splits.train, np.arange(len(splits.train) // 12), splits.train
    return Ways(
        data.TrainBatches(*arguments, weak=of_pillow.weak, strong=of_pillow.strong, **options),
        data.DeviceTrainBatches(
            *arguments, weak=of_batches.weak, strong=of_batches.strong, **options, device=torch.device(device)
        ),
    )


def photographs(folder: Path, count: int = 100) -> data.ImageSplits:
    """Sums of noise of several scales, whose power falls with frequency as that of photographs does."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        pixels = np.zeros((375, 500, 3))
        for scale in (1, 2, 4, 8, 16, 32, 64, 128):
            noise = rng.integers(0, 256, (375 // scale + 2, 500 // scale + 2, 3), dtype=np.uint8)
            pixels += scale**0.25 * (np.asarray(Image.fromarray(noise).resize((500, 375), 2)) - 127.0)
        Image.fromarray((127 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    images = data.FileImages(paths, np.arange(count) % 10, 10)
    return data.ImageSplits(images, images, 10, NAMES, MEAN, STD, 224, augmentation="imagenet")


def photograph_batches(splits: data.ImageSplits, batch_size: int) -> Ways:
    """SimMatch's of photographs, μ = 5."""
    made = [
        data.TrainBatches(
            splits.train,
            np.arange(len(splits.train)),
            splits.train,
            weak=transforms.weak,
            strong=transforms.strong,
            batch_size=batch_size,
            mu=5,
            seed=1,
            start_step=0,
            num_steps=STEPS,
            mean=splits.mean,
            std=splits.std,
        )
        for transforms in (data.default_transforms(splits), data.batch_transforms(splits))
    ]
    return Ways(*made)


def multi_crop_batches(splits: data.ImageSplits, batch_size: int) -> Ways:
    """SwAV's, two crops of 224 pixels and six of 96."""
    collection = data.ImageCollection(splits.train, splits.class_names)
    made = [
        data.MultiCropBatches(
            splits.train,
            data.crop_views(collection, size=224, small_size=96, batched=batched),
            batch_size=batch_size,
            seed=1,
            start_step=0,
            num_steps=STEPS,
        )
        for batched in (False, True)
    ]
    return Ways(*made)


def finished(batches: Any, step: int, device: str = "cpu") -> Any:
    """The batch of a step, its views made on the device where its crops are brought to."""
    batch = batches[step]
    if not batches.cropped:
        return batch
    return batches.finish(type(batch)(*(column.to(device) for column in batch)), step)


class TorchvisionViews:
    """Transforms of torchvision.transforms.v2 as its users compose them: an image at a time, since a call gives all
    images of a batch the same draws.
    """

    def __init__(self) -> None:
        self.v2: Any = importlib.import_module("torchvision.transforms.v2")
        self.io: Any = importlib.import_module("torchvision.io")

    def small(self, *, strong: bool) -> Callable[[Tensor], Tensor]:
        """Flip, shift and, of ``strong`` ones, RandAugment and a cutout of half the side."""
        v2 = self.v2
        parts = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]
        cutout = v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
        return self._normalized(*parts, *([v2.RandAugment(2, 10), cutout] if strong else []))

    def crop(
        self, size: int, scale: tuple[float, float], *, jitter: float = 0.0, largest_blur: float = 2.0
    ) -> Callable[[Tensor], Tensor]:
        """A random crop, a flip and, where there is ``jitter``, MoCo v2's distortions."""
        v2 = self.v2
        parts = [v2.RandomResizedCrop(size, scale=scale), v2.RandomHorizontalFlip()]
        if jitter:
            parts += [
                v2.RandomApply([v2.ColorJitter(jitter, jitter, jitter, jitter / 4)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, largest_blur))], p=0.5),
            ]
        return self._normalized(*parts)

    def _normalized(self, *parts: Any) -> Any:
        v2 = self.v2
        return v2.Compose([*parts, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def photograph(self, dataset: data.FileImages, number: int) -> Tensor:
        decoded: Tensor = self.io.decode_jpeg(self.io.read_file(dataset.path(number)), mode=self.io.ImageReadMode.RGB)
        return decoded
