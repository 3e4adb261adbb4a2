# SPDX-License-Identifier: BSD-3-Clause
"""RandAugment's ops on batches of uint8 images [B, C, H, W], grouped so that a kernel does all images of a kind.

Every op gives the bits of Pillow, whose rules are integer arithmetic, or float32 in a stated order:

* rotations, shears and translations are one gather; the source of a pixel is a 16.16 fixed-point number, as in
  Pillow's ``affine_fixed``;
* autocontrast and equalize are one gather from tables of 256 levels;
* brightness, contrast, color and sharpness blend as ``ImagingBlend`` does: a + f(b − a) in float32,
  clipped and cut off to an integer;
* grey is (19595 R + 38470 G + 7471 B + 2^15) / 2^16, rounded down.

Which op an image gets and how strong it is are arrays of the host, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssmkernels.data.randaugment import OPS, Colour, grey_level

KINDS = {name: number for number, name in enumerate(OPS)}
"""The numbers that stand for the names of :data:`ssmkernels.data.augment.OPS`."""
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
BLENDS = ("Brightness", "Contrast", "Color", "Sharpness")
LEVELS = 256
CACHED = 2**18
"""Values that a processor works on together: a large image or some small ones, whose float32 its cache holds."""


def apply_ops(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray, fill: Colour) -> Tensor:
    """One op on each image.

    Args:
        images: [B, C, H, W] uint8, C = 1 or 3.
        kinds: [B] integers, see :data:`KINDS`; a negative one leaves the image as it is.
        magnitudes: [B] float64, as :data:`ssmkernels.data.augment.OPS` takes them; ignored where an op has none.
        fill: what geometric ops bring in from outside; grey images get its luminance.
    """
    groups = _GROUP_OF_KIND[kinds]
    # Images of one group side by side, first those that stay as they are, and those of one kind within it.
    order = np.lexsort((_PLACE_OF_KIND[kinds], groups))
    ends = np.cumsum(np.bincount(groups, minlength=1 + len(GROUPS)))
    parts = list(images.index_select(0, to_device(order, images)).tensor_split(ends[:-1].tolist()))
    for number, names in enumerate(GROUPS, start=1):
        rows = order[ends[number - 1] : ends[number]]
        if len(rows):
            parts[number] = _CHANGES[names](parts[number], kinds[rows], magnitudes[rows], fill)
    # Not index_copy, which takes twenty times as long on a processor.
    return torch.cat(parts).index_select(0, to_device(np.argsort(order), images))


def _move(images: Tensor, kinds: np.ndarray, magnitudes: np.ndarray, fill: Colour) -> Tensor:
    return affine(images, coefficients(kinds, magnitudes, *images.shape[2:]), fill)


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """On the device of ``like``, without waiting for it."""
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def _per_image(values: np.ndarray, images: Tensor) -> Tensor:
    """A number for each image, [n, 1, 1, 1] uint8."""
    return to_device(values.clip(0, LEVELS - 1).astype(np.uint8), images).view(-1, 1, 1, 1)


def empty_batch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of a batch. By NumPy on a CPU, which asks for huge pages: the system clears fewer of them, in a third of
    the time.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))


def blocks(count: int, values: int, device: torch.device, *, least: int = 1) -> list[slice]:
    """Parts of ``count`` images of ``values`` values each that are worked on together: all on a GPU, few on a CPU."""
    step = max(CACHED // values, least) if device.type == "cpu" else max(count, 1)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def to_levels(values: Tensor) -> Tensor:
    """Floats in [0, 256), cut off to uint8. By way of int32: a processor turns floats into bytes one by one."""
    return values.int().to(torch.uint8)


def blend(start: Tensor, end: Tensor, factor: np.ndarray) -> Tensor:
    """start + factor·(end − start) of each image, clipped and cut off to uint8.

    Args:
        start, end: [n, C, H, W] uint8; those of start may be 1 and hold for all.
        factor: [n].
    """
    per_image = to_device(factor.astype(np.float32), end).view(-1, 1, 1, 1)
    starts = start.expand(len(end), -1, -1, -1)
    blended = []
    for block in blocks(len(end), end[:1].numel(), end.device):
        base = starts[block].float()
        # Not torch.lerp or addcmul, which may round once instead of twice.
        mixed = (end[block].float() - base).mul_(per_image[block]).add_(base)
        blended.append(to_levels(mixed.clamp_(0, LEVELS - 1)))
    return torch.cat(blended)


def grey(images: Tensor) -> Tensor:
    """The luminance (ITU-R 601) of RGB images: [n, 3, H, W] -> [n, 1, H, W], uint8."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """Pillow's ``SMOOTH``: the mean of 3x3 pixels, the middle one counted 5 times; the border as it is."""
    height, width = images.shape[2:]
    result = images.clone()
    if min(height, width) < 3:
        return result
    # Pixels of a plane one after another: three below each other are a width apart. What is summed up across the border
    # of a row is left out.
    pixels = images.flatten(2).short()
    reach = height * width - 2 * width
    rows = (pixels[..., :reach] + pixels[..., width : width + reach]).add_(pixels[..., 2 * width :])
    sums = pixels.new_zeros(*pixels.shape[:2], reach)
    inner = sums[..., 1:-1]
    inner.copy_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:])
    inner.add_(pixels[..., width + 1 : width + reach - 1], alpha=4)
    # To the nearest; no multiple of a thirteenth is half-way.
    smoothed = to_levels(sums.float().mul_(1 / 13).add_(0.5)).view(*images.shape[:2], height - 2, width)
    result[:, :, 1:-1, 1:-1] = smoothed[..., 1:-1]
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


def paint(images: Tensor, rows: np.ndarray, columns: np.ndarray, fill: Colour) -> Tensor:
    """``fill``, or its luminance on grey images [n, C, H, W], where ``rows`` [n, H] and ``columns`` [n, W], bool, are
    both true.
    """
    # 255 where true: bitwise selection takes a tenth of torch.where's time on a CPU.
    rows_mask, columns_mask = (to_device(np.negative(covered.view(np.uint8)), images) for covered in (rows, columns))
    mask = rows_mask[:, :, None] & columns_mask[:, None, :]
    painted = images & ~mask[:, None]
    colour = colour_of(images, fill)
    if len(set(colour)) == 1:
        return painted.bitwise_or_((mask & colour[0])[:, None])
    for channel, level in enumerate(colour):
        painted[:, channel] |= mask & level
    return painted


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Each pixel by the table [n, C, 256] of its image and channel."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _levels(images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.arange(LEVELS, dtype=dtype, device=images.device).view(1, 1, -1)


def _blend_with_base(images: Tensor, kinds: np.ndarray, factor: np.ndarray, fill: Colour) -> Tensor:
    """Brightness, Contrast, Color and Sharpness, images of a kind side by side in this order."""
    count = {name: int((kinds == KINDS[name]).sum()) for name in BLENDS}
    parts = dict(zip(BLENDS, images.split(list(count.values())), strict=True))
    bases = [_BASES[name](part).expand(part.shape) for name, part in parts.items() if count[name]]
    return blend(torch.cat(bases), images, factor)


def mean_level(images: Tensor) -> Tensor:
    """The mean of the grey image, rounded to the nearest (halves upwards): [n, 1, 1, 1] uint8."""
    luminance = images if images.shape[1] == 1 else grey(images)
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * luminance.sum((2, 3), keepdim=True, dtype=torch.int64) + pixels) // (2 * pixels)
    return mean.to(torch.uint8)


_BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "Brightness": lambda images: images.new_zeros(1, 1, 1, 1),
    "Contrast": mean_level,
    "Color": lambda images: images if images.shape[1] == 1 else grey(images),
    "Sharpness": lambda images: smooth(images),
}
"""What an image is blended with."""


def posterize(images: Tensor, bits: np.ndarray) -> Tensor:
    """The highest bits of each level."""
    return images & _per_image(256 - 2 ** (8 - np.rint(bits)), images)


def solarize(images: Tensor, threshold: np.ndarray) -> Tensor:
    """Levels from the threshold on, at least 1 of them, turned over."""
    below = _per_image(np.rint(threshold) - 1, images)  # 256 − 1 fits; a threshold of 0 turns over all
    turned = (images > below) | _per_image(np.rint(threshold) <= 0, images).bool()
    return images ^ turned.to(torch.uint8).neg_()


def autocontrast(images: Tensor) -> Tensor:
    """From the darkest and brightest level of a channel to 0 and 255, rounded towards 0; in float64 as in Pillow."""
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()
    scale = torch.full_like(low, LEVELS - 1) / (high - low)  # number / tensor would multiply by the reciprocal
    levels = _levels(images, torch.float64)
    stretched = (levels * scale + -low * scale).clamp(0, LEVELS - 1)
    return look_up(images, stretched.where(high > low, levels).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Levels as equally frequent as they can be: (pixels below + step/2) / step of a channel, in integers."""
    pixels = images.flatten(2)
    one = torch.ones((), dtype=torch.int64, device=images.device)
    histogram = torch.zeros(*pixels.shape[:2], LEVELS, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, pixels.long(), one.expand(pixels.shape))
    brightest = histogram.gather(2, pixels.amax(2, keepdim=True).long())
    step = (pixels.shape[2] - brightest) // (LEVELS - 1)
    below = histogram.cumsum(2) - histogram
    equal = ((step // 2 + below) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    return look_up(images, equal.where(step > 0, _levels(images, torch.int64)).to(torch.uint8))


_CHANGES: dict[tuple[str, ...], Callable[[Tensor, np.ndarray, np.ndarray, Colour], Tensor]] = {
    GEOMETRIC: _move,
    BLENDS: _blend_with_base,
    ("Posterize",): lambda images, kinds, bits, fill: posterize(images, bits),
    ("Solarize",): lambda images, kinds, threshold, fill: solarize(images, threshold),
    ("AutoContrast",): lambda images, kinds, unused, fill: autocontrast(images),
    ("Equalize",): lambda images, kinds, unused, fill: equalize(images),
}
GROUPS = tuple(_CHANGES)
"""Ops that are one computation; the others leave the image as it is."""
_GROUP_OF_KIND = np.zeros(1 + len(KINDS), dtype=np.int64)  # the last, 0, is of −1
_PLACE_OF_KIND = np.zeros(1 + len(KINDS), dtype=np.int64)  # in its group
for _number, _names in enumerate(GROUPS, start=1):
    _GROUP_OF_KIND[[KINDS[_name] for _name in _names]] = _number
    _PLACE_OF_KIND[[KINDS[_name] for _name in _names]] = np.arange(len(_names))
