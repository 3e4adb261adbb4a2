# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation: views of an image, ``transform(image, rng) -> image``, all randomness from ``rng``; and tensors of
them.

:class:`Weak` and :class:`Strong` are FixMatch's for small images, :class:`ImageNetWeak` and :class:`MoCoV2` SimMatch's
for photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from ssmkernels.data.images import ImageSplits
from ssmkernels.data.randaugment import OPS, VARIANTS, RandAugment, grey_or_rgb, variant_named

__all__ = [
    "OPS",
    "VARIANTS",
    "Cutout",
    "ImageNetWeak",
    "MoCoV2",
    "RandAugment",
    "ResizeCenterCrop",
    "Strong",
    "Transform",
    "Transforms",
    "Weak",
    "default_transforms",
    "to_tensor",
    "to_tensors",
]

Transform = Callable[[Image.Image, np.random.Generator], Image.Image]
EvaluationTransform = Callable[[Image.Image], Image.Image]


class Transforms(NamedTuple):
    """``evaluation`` is None where test images are taken as they are."""

    weak: Transform
    strong: Transform
    evaluation: EvaluationTransform | None


def default_transforms(
    splits: ImageSplits, *, variant: str = "fixmatch", flip: bool | None = None, shift: int | None = None
) -> Transforms:
    """The weak, strong and evaluation transform for a data set, by its ``augmentation``.

    "crop-flip" is :class:`Weak` and :class:`Strong`; "crop" is the same without the flip, for digits; "imagenet" is
    :class:`ImageNetWeak`, :class:`MoCoV2` and :class:`ResizeCenterCrop`. Crops shift by up to an eighth of the side.

    Args:
        variant: of RandAugment and cutout, "fixmatch" or "torchssl".
        flip: whether images are mirrored, instead of what the data set says.
        shift: largest shift in pixels, instead of an eighth of the side; not of photographs, which are cut otherwise.
    """
    size = splits.image_size
    if splits.augmentation == "imagenet":
        if shift is not None:
            raise ValueError(f"shift is {shift}; it should be none for photographs, whose crops are of random areas")
        flip = flip is not False
        return Transforms(
            ImageNetWeak(size, flip=flip), MoCoV2(size, flip=flip), ResizeCenterCrop(round(size * 256 / 224), size)
        )
    padding, flip = shift_and_flip(splits, shift, flip)
    return Transforms(Weak(size, padding, flip), Strong(size, padding, flip, variant=variant), None)


def shift_and_flip(splits: ImageSplits, shift: int | None, flip: bool | None) -> tuple[int, bool]:
    """Those given, or those of the data set."""
    return (
        splits.image_size // 8 if shift is None else shift,
        splits.augmentation == "crop-flip" if flip is None else flip,
    )


class Weak:
    """A crop out of the image padded by reflection, that is a shift, and a flip (FixMatch, section 2.3).

    Args:
        size: side of the images in pixels.
        padding: largest shift in pixels.
        flip: mirror every other image left to right; not for digits.
    """

    def __init__(self, size: int, padding: int = 4, flip: bool = True) -> None:
        if not 0 <= padding < size:
            raise ValueError(f"padding is {padding}; it should be in [0, size), size being {size}")
        self.size, self.padding, self.flip = size, padding, flip
        self.reflected = np.pad(np.arange(size), padding, mode="reflect")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if image.size != (self.size, self.size):
            raise ValueError(f"image is {image.width}x{image.height}; it should be {self.size}x{self.size}")
        top, left = rng.integers(2 * self.padding + 1, size=2)
        rows = self.reflected[top : top + self.size]
        columns = self.reflected[left : left + self.size]
        if self.flip and rng.random() < 0.5:
            columns = columns[::-1]
        return Image.fromarray(np.asarray(image).take(rows, axis=0).take(columns, axis=1))


class Cutout:
    """A square around a random pixel, as far as it lies inside the image, painted over (DeVries and Taylor, 2017).

    Args:
        share: its side as a share of the image's.
        fill: its colour; grey images get its luminance.
        uniform: draw the share from [0, share) instead.
    """

    def __init__(
        self, share: float = 0.5, fill: tuple[int, int, int] = (127, 127, 127), *, uniform: bool = False
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; it should be in [0, 1]")
        self.share, self.fill, self.uniform = share, fill, uniform

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        share = self.share * rng.random() if self.uniform else self.share
        width, height = round(share * image.width), round(share * image.height)
        left = int(rng.integers(image.width)) - width // 2
        top = int(rng.integers(image.height)) - height // 2
        box = (max(left, 0), max(top, 0), min(left + width, image.width), min(top + height, image.height))
        image = image.copy()
        if box[0] < box[2] and box[1] < box[3]:
            image.paste(grey_or_rgb(image, self.fill), box)
        return image


class Strong:
    """:class:`Weak`, :class:`RandAugment`, :class:`Cutout`.

    Args:
        size, padding, flip: of :class:`Weak`.
        variant: "fixmatch": 2 ops, each with probability ½, and a grey square of half the side; "torchssl": 3 ops
            always, and a square of up to half the side.
    """

    def __init__(self, size: int, padding: int = 4, flip: bool = True, *, variant: str = "fixmatch") -> None:
        recipe = variant_named(variant)
        self.weak = Weak(size, padding, flip)
        self.rand_augment = RandAugment(variant=variant)
        self.cutout = Cutout(recipe.cutout, recipe.cutout_fill, uniform=recipe.cutout_uniform)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.cutout(self.rand_augment(self.weak(image, rng), rng), rng)


class ImageNetWeak:
    """A crop of random area and aspect (3/4 to 4/3), resized, and a flip.

    Args:
        size: side of the result in pixels.
        scale: least and greatest share of the image's area.
        flip: mirror every other image left to right; not for digits and signs.
    """

    def __init__(self, size: int = 224, scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; it should be two shares in (0, 1], the lesser first")
        self.size, self.scale, self.flip = size, scale, flip

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=self._box(image, rng))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip and rng.random() < 0.5 else image

    def _box(self, image: Image.Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = image.width * image.height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= image.width and 0 < height <= image.height:
                left = int(rng.integers(image.width - width + 1))
                top = int(rng.integers(image.height - height + 1))
                return left, top, left + width, top + height
        # An image so narrow that no draw fits: its centre, as wide or as high as the aspects allow.
        width = min(image.width, round(image.height * 4 / 3))
        height = min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return left, top, left + width, top + height


class MoCoV2:
    """The augmentation of MoCo v2 (Chen et al., 2020): :class:`ImageNetWeak`, colour jitter, greyscale, blur.

    Jitter of brightness, contrast, saturation and hue, in random order, with probability 0.8; grey with probability
    0.2; Gaussian blur, σ of at least 0.1 pixels, with probability 0.5.

    Args:
        size, scale, flip: of :class:`ImageNetWeak`.
        jitter: largest change of brightness, contrast and saturation; that of the hue, as a share of the circle, is a
            quarter of it.
        blur: greatest σ in pixels; 0 for no blur.
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        *,
        flip: bool = True,
        jitter: float = 0.4,
        blur: float = 2.0,
    ) -> None:
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter is {jitter}; it should be in [0, 1]")
        if blur != 0 and not blur >= 0.1:
            raise ValueError(f"blur is {blur}; it should be 0 or at least 0.1")
        self.crop = ImageNetWeak(size, scale, flip)
        self.jitter, self.blur = jitter, blur

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = self.crop(image, rng)
        if rng.random() < 0.8:
            image = self._jittered(image, rng)
        if rng.random() < 0.2:
            image = image.convert("L").convert(image.mode)
        if self.blur > 0 and rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, self.blur)))
        return image

    def _jittered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in rng.permutation(4):
            if which < 3:
                image = enhancers[which](image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
            else:
                image = _shift_hue(image, rng.uniform(-self.jitter / 4, self.jitter / 4))
        return image


class ResizeCenterCrop:
    """The evaluation transform of ImageNet, ``transform(image) -> image``: shorter side to ``resize``, then the
    central ``size`` square.
    """

    def __init__(self, resize: int = 256, size: int = 224) -> None:
        if not 0 < size <= resize:
            raise ValueError(f"size is {size}; it should be in [1, resize], resize being {resize}")
        self.resize, self.size = resize, size

    def __call__(self, image: Image.Image) -> Image.Image:
        ratio = self.resize / min(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The image as float32 [C, H, W], (pixel / 255 − mean) / std per channel."""
    return to_tensors([image], mean, std)[0]


def to_tensors(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """N images of one size and mode as float32 [N, C, H, W], (pixel / 255 − mean) / std per channel."""
    pixels = to_pixels(images)
    scale, shift = scale_and_shift(mean, std, pixels.shape[1])
    tensors = np.empty(pixels.shape, dtype=np.float32)
    np.multiply(pixels, scale, out=tensors)
    tensors -= shift
    return torch.from_numpy(tensors)


def to_pixels(images: Sequence[Image.Image]) -> np.ndarray:
    """N images of one size and mode as uint8 [N, C, H, W]."""
    if len({(image.size, image.mode) for image in images}) != 1:
        kinds = sorted({f"{image.mode} {image.width}x{image.height}" for image in images})
        raise ValueError(
            f"images are {', '.join(kinds) or 'none'}; they should be of one size and mode to make a batch"
        )
    pixels = np.stack([np.asarray(image) for image in images])
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def scale_and_shift(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """1/(255 std) and mean/std, float32 [C, 1, 1] each: a pixel times the one, less the other, is normalised."""
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean has {len(mean)} values and std {len(std)}; both should have {channels}, one per channel"
        )
    scale = (1 / (255 * np.asarray(std))).astype(np.float32)
    shift = (np.asarray(mean) / std).astype(np.float32)
    return scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1)


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """``turn`` is a share of the colour circle."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + round(turn * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
