# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation of batches, uint8 in and uint8 out, on the device where the images are.

Each transform here has its counterpart for one Pillow image in :mod:`ssmkernels.data.augment`: the distribution of
every parameter is the same, and so is the image that the same parameters give. The parameters are drawn on the host
from (seed, stream, step, position), see :func:`ssmkernels.data.philox.uniforms`: they depend neither on the device
nor on how a batch is split over ranks, and grouping images by what is done to them waits for no device.

A draw is uniform to 2^−32; of n choices each has probability 1/n ± 2^−32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.data import batched_ops
from ssmkernels.data.augment import Cutout, Weak, scale_and_shift
from ssmkernels.data.batched_ops import to_device
from ssmkernels.data.philox import uniforms
from ssmkernels.data.randaugment import OPS, SIGNED, Colour, RandAugment, variant_named

_SIGNED = np.array([name in SIGNED for name in OPS])


class BatchTransform(Protocol):
    """Images [B, C, H, W] uint8 and numbers [B, num_draws] float64 in [0, 1) -> images, uint8."""

    num_draws: int
    """Numbers that an image takes."""

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor: ...


def augment(
    images: Tensor, transform: BatchTransform, *, seed: int, stream: int, step: int, positions: np.ndarray
) -> Tensor:
    """The views of a batch, each a function of (seed, stream, step, its position) and its image.

    Args:
        images: [B, C, H, W] uint8.
        positions: [B] integers, places of the images in the batch of all ranks.
    """
    return transform(images, uniforms(seed, stream, step, positions, transform.num_draws))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The images [N, C, H, W] as float32, (pixel / 255 − mean) / std per channel; the bits of
    :func:`ssmkernels.data.augment.to_tensors`.
    """
    scale, shift = scale_and_shift(mean, std, images.shape[1])
    floats = batched_ops.empty_batch(images.shape, torch.float32, images.device).copy_(images)
    return floats.mul_(to_device(scale, images)).sub_(to_device(shift, images))


class BatchWeak:
    """:class:`ssmkernels.data.augment.Weak`: a shift of the reflected image, and a flip.

    Args:
        size: side of the images in pixels.
        padding: largest shift in pixels.
        flip: mirror every other image left to right.
    """

    num_draws = 3  # down, right, flip

    def __init__(self, size: int, padding: int = 4, flip: bool = True) -> None:
        self.settings = Weak(size, padding, flip)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[2:]
        size, padding = self.settings.size, self.settings.padding
        if (height, width) != (size, size):
            raise ValueError(f"images are {width}x{height}; they should be {size}x{size}")
        top, left = (draws[:, :2] * (2 * padding + 1)).astype(np.int64).T
        flipped = (draws[:, 2] < 0.5) & self.settings.flip
        if images.device.type == "cpu":
            return cut(images, top, left, flipped, padding)
        return gathered(images, top, left, flipped, self.settings.reflected)


def cut(images: Tensor, top: np.ndarray, left: np.ndarray, flipped: np.ndarray, padding: int) -> Tensor:
    """Windows of the reflected images at ``top`` and ``left``, those ``flipped`` mirrored; all [B]. Rows are copied, in
    half the time that a processor takes to gather pixels.
    """
    padded = F.pad(images, (padding,) * 4, mode="reflect").numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    views = torch.from_numpy(windows[np.arange(len(images)), :, top, left])
    turned = np.flatnonzero(flipped)
    views.numpy()[turned] = views.index_select(0, torch.from_numpy(turned)).flip(3).numpy()
    return views


def gathered(images: Tensor, top: np.ndarray, left: np.ndarray, flipped: np.ndarray, reflected: np.ndarray) -> Tensor:
    """The same by one kernel, where ``reflected`` [H + 2 · padding] is the row or column that each of the padded is."""
    count, channels, size, _ = images.shape
    rows, columns = (reflected[start[:, None] + np.arange(size)] for start in (top, left))
    columns = np.where(flipped[:, None], columns[:, ::-1], columns)
    first, within = to_device(rows * size, images), to_device(columns, images)
    index = (first[:, :, None] + within[:, None, :]).view(count, 1, -1)
    return images.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(images)


class BatchRandAugment:
    """:class:`ssmkernels.data.augment.RandAugment`: random ops of random magnitude, without the cutout after them.

    Args:
        num_ops: ops of an image, drawn with replacement from the 14; by default the variant's.
        probability: of applying each; by default the variant's.
        variant: "fixmatch" or "torchssl".
    """

    def __init__(
        self, num_ops: int | None = None, probability: float | None = None, *, variant: str = "fixmatch"
    ) -> None:
        self.settings = RandAugment(num_ops, probability, variant=variant)
        self.recipe = variant_named(variant)
        self.num_draws = 4 * self.settings.num_ops  # which op, its level, its sign, whether it is applied

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        for number in range(self.settings.num_ops):
            kinds, magnitudes = self.parameters(draws[:, 4 * number : 4 * number + 4])
            images = batched_ops.apply_ops(images, kinds, magnitudes, self.recipe.fill)
        return images

    def parameters(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of ops, −1 for none, and their magnitudes, from [B, 4] draws."""
        which, levels, signs, applied = draws.T
        drawn = (which * len(OPS)).astype(np.int64)
        if self.recipe.levels is not None:
            levels = (1 + np.floor(levels * (self.recipe.levels - 1))) / self.recipe.levels
        magnitudes = np.zeros(len(draws))
        for name, magnitude in self.recipe.magnitudes.items():
            rows = drawn == batched_ops.KINDS[name]
            magnitudes[rows] = magnitude(levels[rows])
        magnitudes = np.where(_SIGNED[drawn] & (signs < 0.5), -magnitudes, magnitudes)
        return np.where(applied < self.settings.probability, drawn, -1), magnitudes


class BatchCutout:
    """:class:`ssmkernels.data.augment.Cutout`: a square around a random pixel, painted over.

    Args:
        share: its side as a share of the image's.
        fill: its colour; grey images get its luminance.
        uniform: draw the share from [0, share) instead.
    """

    num_draws = 3  # share, column and row of the middle

    def __init__(self, share: float = 0.5, fill: Colour = (127, 127, 127), *, uniform: bool = False) -> None:
        self.settings = Cutout(share, fill, uniform=uniform)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[2:]
        settings = self.settings
        share = settings.share * draws[:, 0] if settings.uniform else np.full(len(draws), settings.share)
        columns, rows = self._covered(draws[:, 1], share, width), self._covered(draws[:, 2], share, height)
        return batched_ops.paint(images, rows, columns, settings.fill)

    @staticmethod
    def _covered(middle: np.ndarray, share: np.ndarray, side: int) -> np.ndarray:
        """[B, side] bool: the rows or columns of the square."""
        length = np.rint(share * side).astype(np.int64)
        start = (middle * side).astype(np.int64) - length // 2
        place = np.arange(side)
        return (place >= start[:, None]) & (place < (start + length)[:, None])


class BatchStrong:
    """:class:`BatchWeak`, :class:`BatchRandAugment`, :class:`BatchCutout`.

    Args:
        size, padding, flip: of :class:`BatchWeak`.
        variant: as of :class:`ssmkernels.data.augment.Strong`.
    """

    def __init__(self, size: int, padding: int = 4, flip: bool = True, *, variant: str = "fixmatch") -> None:
        recipe = variant_named(variant)
        self.parts = (
            BatchWeak(size, padding, flip),
            BatchRandAugment(variant=variant),
            BatchCutout(recipe.cutout, recipe.cutout_fill, uniform=recipe.cutout_uniform),
        )
        self.num_draws = sum(part.num_draws for part in self.parts)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        first = 0
        for part in self.parts:
            images = part(images, draws[:, first : first + part.num_draws])
            first += part.num_draws
        return images
