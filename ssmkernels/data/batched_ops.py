# SPDX-License-Identifier: BSD-3-Clause
"""RandAugment's ops on batches of uint8 images [B, C, H, W], grouped so that a kernel does all images of a kind.

Every op gives the bits of Pillow, whose rules are integer arithmetic, or float32 in a stated order:

* rotations, shears and translations are one gather; the source of a pixel is a 16.16 fixed-point number, as in
  Pillow's ``affine_fixed``;
* brightness, contrast, posterize, solarize, autocontrast and equalize are one gather from tables of 256 levels;
* color, sharpness and the tables of brightness and contrast blend as ``ImagingBlend`` does: a + f(b − a) in float32,
  clipped and cut off to an integer;
* grey is (19595 R + 38470 G + 7471 B + 2^15) / 2^16, rounded down.

Which op an image gets and how strong it is are arrays of the host, so nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmkernels.data.randaugment import OPS, Colour, grey_level

KINDS = {name: number for number, name in enumerate(OPS)}
"""The numbers that stand for the names of :data:`ssmkernels.data.augment.OPS`."""
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
TABLES = ("Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize")
GROUPS = (GEOMETRIC, TABLES, ("Sharpness",), ("Color",))
"""Ops that are one computation; the others leave the image as it is."""
LEVELS = 256


def apply_ops(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray, fill: Colour) -> Tensor:
    """One op on each image.

    Args:
        images: [B, C, H, W] uint8, C = 1 or 3.
        kinds: [B] integers, see :data:`KINDS`; a negative one leaves the image as it is.
        magnitudes: [B] float64, as :data:`ssmkernels.data.augment.OPS` takes them; ignored where an op has none.
        fill: what geometric ops bring in from outside; grey images get its luminance.
    """
    groups = np.full(1 + len(KINDS), 0)  # by kind; the last, 0, is of −1
    for number, names in enumerate(GROUPS, start=1):
        groups[[KINDS[name] for name in names]] = number
    # Images of one group side by side, and those of one kind within it.
    order = np.lexsort((kinds, groups[kinds]))
    ends = np.cumsum(np.bincount(groups[kinds], minlength=1 + len(GROUPS)))
    parts = list(images.index_select(0, to_device(order, images)).tensor_split(ends[:-1].tolist()))
    for number, change in enumerate((_move, _look_up, _sharpen, _color), start=1):
        rows = order[ends[number - 1] : ends[number]]
        if len(rows):
            parts[number] = change(parts[number], kinds[rows], magnitudes[rows], fill)
    return torch.cat(parts).index_select(0, to_device(np.argsort(order), images))


def _move(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray, fill: Colour) -> Tensor:
    return affine(images, coefficients(kinds, magnitudes, *images.shape[2:]), fill)


def _look_up(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray, fill: Colour) -> Tensor:
    return look_up(images, tables(images, kinds, magnitudes))


def _sharpen(images: Tensor, kinds: np.ndarray, factor: np.ndarray, fill: Colour) -> Tensor:
    return blend(smooth(images), images, factor)


def _color(images: Tensor, kinds: np.ndarray, factor: np.ndarray, fill: Colour) -> Tensor:
    return images if images.shape[1] == 1 else blend(grey(images), images, factor)


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """On the device of ``like``, without waiting for it."""
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def blend(start: Tensor, end: Tensor, factor: np.ndarray) -> Tensor:
    """start + factor·(end − start) of each image, clipped and cut off to uint8.

    Args:
        start, end: [n, …], broadcast against each other; uint8.
        factor: [n].
    """
    per_image = to_device(factor.astype(np.float32), end).view(-1, *[1] * (end.ndim - 1))
    base = start.float()
    # Not torch.lerp or addcmul, which may round once instead of twice.
    return ((end.float() - base) * per_image).add_(base).clamp_(0, LEVELS - 1).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """The luminance (ITU-R 601) of RGB images: [n, 3, H, W] -> [n, 1, H, W], uint8."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """Pillow's ``SMOOTH``: the mean of 3x3 pixels, the middle one counted 5 times; the border as it is."""
    levels = images.float()
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, :, 1:-1, 1:-1]
    result = images.clone()
    # To the nearest; no multiple of a thirteenth is half-way.
    result[:, :, 1:-1, 1:-1] = sums.mul_(1 / 13).add_(0.5).to(torch.uint8)
    return result


def coefficients(kinds: np.ndarray, magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """[n, 6] of geometric ops, so that pixel (x, y) comes from (ax + by + c, dx + ey + f)."""
    identity = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    result = np.tile(identity, (len(kinds), 1))
    for name, column in (("ShearX", 1), ("ShearY", 3)):
        rows = kinds == KINDS[name]
        result[rows, column] = magnitudes[rows]
    for name, column, side in (("TranslateX", 2, width), ("TranslateY", 5, height)):
        rows = kinds == KINDS[name]
        # Nearest neighbour moves by whole pixels; Pillow computes these in float64, without fixed point.
        result[rows, column] = np.floor(magnitudes[rows] * side + 0.5)
    rows = kinds == KINDS["Rotate"]
    angle = -np.radians(magnitudes[rows] % 360)
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2, height / 2
    result[rows] = np.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], axis=1)
    return result


def affine(images: Tensor, matrix: np.ndarray, fill: Colour) -> Tensor:
    """Pixel (x, y) from (ax + by + c, dx + ey + f), nearest neighbour; ``fill`` where that is outside.

    Args:
        matrix: [n, 6] float64, a to f; a source that is less than 2^15 pixels away.
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrix.T
    fixed = np.floor(np.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2]) * 65536 + 0.5).astype(np.int32)
    a, b, c, d, e, f = to_device(fixed, images)[:, :, None, None]
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    y = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    # What is outside comes from a frame of one pixel around the image.
    source_x = (a * x + (b * y + c)).bitwise_right_shift_(16).clamp_(-1, width)
    source_y = (d * x + (e * y + f)).bitwise_right_shift_(16).clamp_(-1, height)
    framed = images.new_empty(count, channels, height + 2, width + 2)
    for channel, level in enumerate(colour_of(images, fill)):
        framed[:, channel].fill_(level)
    framed[:, :, 1:-1, 1:-1] = images
    index = source_y.add_(1).mul_(width + 2).add_(source_x).add_(1).long().view(count, 1, -1)
    return framed.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(images)


def colour_of(images: Tensor, fill: Colour) -> tuple[int, ...]:
    """``fill`` by channel: its luminance on grey images."""
    return fill if images.shape[1] == 3 else (grey_level(fill),)


def paint(images: Tensor, where: Tensor, fill: Colour) -> Tensor:
    """``fill``, or its luminance on grey images [n, C, H, W], where ``where`` [n, 1, H, W] is true."""
    # 255 where true: bitwise selection takes a tenth of torch.where's time on a CPU.
    mask = where[:, 0].to(torch.uint8).neg_()
    painted = images & ~mask[:, None]
    for channel, level in enumerate(colour_of(images, fill)):
        if level:
            painted[:, channel] |= mask & level
    return painted


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Each pixel by the table [n, C, 256] of its image and channel."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def tables(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray) -> Tensor:
    """[n, C, 256] uint8: what becomes of each level. Images of one kind are side by side."""
    result = torch.empty(*images.shape[:2], LEVELS, dtype=torch.uint8, device=images.device)
    for name in TABLES:
        rows = np.flatnonzero(kinds == KINDS[name])
        if len(rows):
            of_kind = slice(rows[0], rows[-1] + 1)
            if name in _FIXED_TABLES:
                result[of_kind] = to_device(_fixed_table(name, magnitudes[of_kind]), images)
            else:
                result[of_kind] = _TABLES[name](images[of_kind], magnitudes[of_kind])
    return result


# Those that do not depend on the image, made on the host: magnitudes [n, 1] -> [n, 256].
_LEVELS = np.arange(LEVELS, dtype=np.float32)
_FIXED_TABLES = {
    "Brightness": lambda factor: (_LEVELS * factor.astype(np.float32)).clip(0, LEVELS - 1),
    "Posterize": lambda bits: _LEVELS - _LEVELS % 2 ** (8 - np.rint(bits)),
    "Solarize": lambda threshold: np.where(np.rint(threshold) > _LEVELS, _LEVELS, LEVELS - 1 - _LEVELS),
}


def _fixed_table(name: str, magnitudes: np.ndarray) -> np.ndarray:
    """[n, 1, 256] uint8."""
    return _FIXED_TABLES[name](magnitudes[:, None]).astype(np.uint8)[:, None]


def _levels(images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.arange(LEVELS, dtype=dtype, device=images.device).view(1, 1, -1)


def _contrast(images: Tensor, factor: np.ndarray) -> Tensor:
    """Blended with the mean of the grey image, rounded to the nearest (halves upwards)."""
    luminance = images if images.shape[1] == 1 else grey(images)
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * luminance.sum((2, 3), dtype=torch.int64) + pixels) // (2 * pixels)
    return blend(mean.to(torch.uint8)[:, :, None], _levels(images), factor)


def _autocontrast(images: Tensor, unused: np.ndarray) -> Tensor:
    """From the darkest and brightest level of a channel to 0 and 255, rounded towards 0; in float64 as in Pillow."""
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    scale = torch.full_like(low, LEVELS - 1) / (high - low)  # number / tensor would multiply by the reciprocal
    levels = _levels(images, torch.float64)
    stretched = (levels * scale + -low * scale).clamp(0, LEVELS - 1)
    return stretched.where(high > low, levels).to(torch.uint8)


def _equalize(images: Tensor, unused: np.ndarray) -> Tensor:
    """Levels as equally frequent as they can be: (pixels below + step/2) / step of a channel, in integers."""
    pixels = images.flatten(2)
    one = torch.ones((), dtype=torch.int64, device=images.device)
    histogram = torch.zeros(*pixels.shape[:2], LEVELS, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, pixels.long(), one.expand(pixels.shape))
    brightest = histogram.gather(2, pixels.amax(2, keepdim=True).long())
    step = (pixels.shape[2] - brightest) // (LEVELS - 1)
    below = histogram.cumsum(2) - histogram
    equal = ((step // 2 + below) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    return equal.where(step > 0, _levels(images, torch.int64)).to(torch.uint8)


_TABLES = {
    "Contrast": _contrast,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
