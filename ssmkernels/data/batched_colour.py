# SPDX-License-Identifier: BSD-3-Clause
"""Colour jitter, greyscale, blur and flips of batches of uint8 images [n, C, H, W], each image by its own numbers.

Brightness, contrast, saturation and grey have the bits of Pillow; a turned hue is a level off where float32 rounds
otherwise than Pillow's float64, the blur up to three, since Pillow rounds to levels after each of six passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.data.batched_ops import blend, blocks, grey, mean_level, to_device, to_levels

BLUR_PASSES = 3
BLURRED_TOGETHER = 4
"""Images at least, where there are as many: convolutions of fewer planes take the slow way through oneDNN."""


def change_rows_(
    images: Tensor, rows: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor], *, least: int = 1
) -> None:
    """Puts ``change(images[part], part)`` into the rows of every part of ``rows``."""
    for block in blocks(len(rows), images[:1].numel(), images.device, least=least):
        part = rows[block]
        where = to_device(part, images)
        changed = change(images.index_select(0, where), part)
        if images.device.type == "cpu":  # index_copy_ takes ten times as long there
            for row, image in zip(part, changed, strict=True):
                images[row].copy_(image)
        else:
            images.index_copy_(0, where, changed)


def flip_(images: Tensor, flipped: np.ndarray) -> None:
    """Mirrors those that ``flipped`` [n] bool says left to right."""
    change_rows_(images, np.flatnonzero(flipped), lambda part, rows: part.flip(3))


def jitter_(images: Tensor, order: np.ndarray, factors: np.ndarray, turns: np.ndarray) -> None:
    """Changes of brightness (0), contrast (1), saturation (2) and hue (3), one after another.

    Args:
        order: [n, 4], the number of the change that an image gets first, second and so on; −1 for none.
        factors: [n, 3], of brightness, contrast and saturation, as Pillow's enhancers take them.
        turns: [n], of the hue, as a share of the circle of colours.
    """
    changes: list[Callable[[Tensor, np.ndarray], Tensor]] = [
        lambda part, rows: blend(part.new_zeros(1, 1, 1, 1), part, factors[rows, 0]),
        lambda part, rows: blend(mean_level(part), part, factors[rows, 1]),
        lambda part, rows: part if part.shape[1] == 1 else blend(grey(part), part, factors[rows, 2]),
        lambda part, rows: part if part.shape[1] == 1 else turned_hue(part, turns[rows]),
    ]
    for of_turn in order.T:
        for number, change in enumerate(changes):
            change_rows_(images, np.flatnonzero(of_turn == number), change)


def grey_(images: Tensor, greyed: np.ndarray) -> None:
    """Takes the colours of those that ``greyed`` [n] bool says."""
    if images.shape[1] == 3:
        change_rows_(images, np.flatnonzero(greyed), lambda part, rows: grey(part).expand(part.shape))


def blur_(images: Tensor, sigmas: np.ndarray, largest: float) -> None:
    """A Gaussian blur of σ = ``sigmas`` [n] pixels, at most ``largest``; 0 for none."""
    rows = np.flatnonzero(sigmas)
    change_rows_(images, rows, lambda part, which: blurred(part, sigmas[which], largest), least=BLURRED_TOGETHER)


def turned_hue(images: Tensor, turns: np.ndarray) -> Tensor:
    """The hue turned by round(255 · turn) of 256 parts of the circle, on Pillow's HSV, whose numbers are levels too.

    Args:
        images: [n, 3, H, W] uint8.
        turns: [n].
    """
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    red, green, blue = images.float().split(1, dim=1)
    chroma = (value - least).float()
    divisor = chroma.clamp(min=1)
    value = value.float()
    # By which channel is brightest; six parts of the circle from red over green to blue.
    hue = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = _wrapped(hue.div_(6).add_(1), 1).mul_(255).floor_()
    saturation = (chroma * 255).div_(value.clamp(min=1)).floor_().div_(255)
    parts = to_device((np.rint(turns * 255) % 256).astype(np.float32), images).view(-1, 1, 1, 1)
    hue = _wrapped(hue + parts, 256).mul_(6 / 255)
    channels = []
    for first in (5.0, 3.0, 1.0):  # of red, green, blue: how far along the circle their falling side begins
        along = _wrapped(hue + first, 6)
        share = torch.minimum(along, 4 - along).clamp_(0, 1)
        channels.append(share.mul_(saturation).neg_().add_(1).mul_(value).add_(0.5))
    return to_levels(torch.cat(channels, dim=1))


def _wrapped(values: Tensor, period: float) -> Tensor:
    """``values`` ≥ 0 modulo ``period``, in place; torch's remainder takes ten times as long."""
    return values.sub_((values / period).floor_().mul_(period))


def blurred(images: Tensor, sigmas: np.ndarray, largest: float) -> Tensor:
    """Pillow's ``GaussianBlur``: three boxes of fractional width, one after another, along rows and columns.

    Args:
        images: [n, C, H, W] uint8.
        sigmas: [n], pixels, at most ``largest``.
    """
    count, channels, height, width = images.shape
    reach = BLUR_PASSES * (int(box_radius(np.array([largest]))[0]) + 1)
    kernels = to_device(blur_kernels(sigmas, reach), images).repeat_interleave(channels, 0)
    planes = images.float().view(1, count * channels, height, width)
    for shape, padding in (((1, -1), (reach, reach, 0, 0)), ((-1, 1), (0, 0, reach, reach))):
        weight = kernels.view(count * channels, 1, *(2 * reach + 1 if side < 0 else 1 for side in shape))
        planes = F.conv2d(F.pad(planes, padding, mode="replicate"), weight, groups=count * channels)
    return to_levels(planes.view(images.shape).add_(0.5).clamp_(0, 255))


def box_radius(sigmas: np.ndarray) -> np.ndarray:
    """The radius r of a box of width 2r + 1 whose threefold application has the deviation σ (Gwosdek et al., 2011)."""
    variance = sigmas**2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + part


def blur_kernels(sigmas: np.ndarray, reach: int) -> np.ndarray:
    """The weights of the pixels at −``reach`` … ``reach``, [n, 2 · reach + 1] float32."""
    radius = box_radius(sigmas)[:, None]
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.clip(radius + 1 - distance, 0, 1) / (2 * radius + 1)
    along = np.fft.rfft(np.fft.ifftshift(box, axes=1), axis=1)  # its ends are 0: nothing meets around the circle
    kernels = np.fft.fftshift(np.fft.irfft(along**BLUR_PASSES, n=2 * reach + 1, axis=1), axes=1)
    return kernels.astype(np.float32)
