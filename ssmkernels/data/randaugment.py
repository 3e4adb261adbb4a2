# SPDX-License-Identifier: BSD-3-Clause
"""RandAugment (Cubuk et al., 2020) on Pillow images of mode RGB or L, in the two variants that semi-supervised
learning uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Colour = tuple[int, int, int]


def grey_or_rgb(image: Image.Image, colour: Colour) -> int | Colour:
    """``colour`` in the mode of ``image``: itself for RGB, its luminance (ITU-R 601) for L."""
    return colour if image.mode == "RGB" else grey_level(colour)


def grey_level(colour: Colour) -> int:
    return round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])


def _affine(
    image: Image.Image, fill: Colour, a: float, b: float, c: float, d: float, e: float, f: float
) -> Image.Image:
    """Pixel (x, y) from (ax + by + c, dx + ey + f), nearest neighbour."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=grey_or_rgb(image, fill))


def _color(image: Image.Image, factor: float, fill: Colour) -> Image.Image:
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


# (image, magnitude, fill) -> image. Magnitudes: degrees, fractions of the side, enhancement factors, bits that stay, a
# grey level.
OPS: dict[str, Callable[[Image.Image, float, Colour], Image.Image]] = {
    "Identity": lambda image, m, fill: image,
    "AutoContrast": lambda image, m, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, fill: ImageOps.equalize(image),
    "Rotate": lambda image, m, fill: image.rotate(m, fillcolor=grey_or_rgb(image, fill)),
    "Solarize": lambda image, m, fill: ImageOps.solarize(image, round(m)),
    "Color": _color,
    "Contrast": lambda image, m, fill: ImageEnhance.Contrast(image).enhance(m),
    "Brightness": lambda image, m, fill: ImageEnhance.Brightness(image).enhance(m),
    "Sharpness": lambda image, m, fill: ImageEnhance.Sharpness(image).enhance(m),
    "ShearX": lambda image, m, fill: _affine(image, fill, 1, m, 0, 0, 1, 0),
    "ShearY": lambda image, m, fill: _affine(image, fill, 1, 0, 0, m, 1, 0),
    "TranslateX": lambda image, m, fill: _affine(image, fill, 1, 0, m * image.width, 0, 1, 0),
    "TranslateY": lambda image, m, fill: _affine(image, fill, 1, 0, 0, 0, 1, m * image.height),
    "Posterize": lambda image, m, fill: ImageOps.posterize(image, round(m)),
}
_NAMES = tuple(OPS)
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
_ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")


@dataclass(frozen=True)
class Variant:
    """How one code base reads RandAugment.

    Args:
        num_ops: ops of an image, drawn with replacement.
        probability: of applying each of them.
        levels: u is uniform on 1/levels … (levels − 1)/levels; without, on [0, 1).
        magnitudes: of the ops that have one, from u, a number or an array.
        fill: what geometric ops bring in from outside.
        cutout: side of the square cut out, as a share of the image's.
        cutout_uniform: draw the share from [0, cutout) instead.
        cutout_fill: its colour.
    """

    num_ops: int
    probability: float
    levels: int | None
    magnitudes: Mapping[str, Callable[[Any], Any]]
    fill: Colour
    cutout: float
    cutout_uniform: bool
    cutout_fill: Colour


VARIANTS = {
    # The code of FixMatch (Sohn et al., 2020), RA arm. Images are in [-1, 1] there, and what is missing is 0, mid-grey.
    "fixmatch": Variant(
        num_ops=2,
        probability=0.5,
        levels=10,
        magnitudes={
            **dict.fromkeys(_ENHANCE, lambda u: 0.1 + 1.8 * u),
            **dict.fromkeys(("ShearX", "ShearY"), lambda u: 0.3 * u),
            **dict.fromkeys(("TranslateX", "TranslateY"), lambda u: 10 / 32 * u),
            "Rotate": lambda u: 30 * u,
            "Solarize": lambda u: 256 - np.floor(256 * u),
            "Posterize": lambda u: 4 - np.floor(4 * u),
        },
        fill=(127, 127, 127),
        cutout=0.5,
        cutout_uniform=False,
        cutout_fill=(127, 127, 127),
    ),
    # TorchSSL (Zhang et al., FlexMatch, 2021) and USB.
    "torchssl": Variant(
        num_ops=3,
        probability=1.0,
        levels=None,
        magnitudes={
            **dict.fromkeys(_ENHANCE, lambda u: 0.05 + 0.9 * u),
            **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY"), lambda u: 0.3 * u),
            "Rotate": lambda u: 30 * u,
            "Solarize": lambda u: 256 * u,
            "Posterize": lambda u: 4 + np.floor(4 * u),
        },
        fill=(0, 0, 0),
        cutout=0.5,
        cutout_uniform=True,
        cutout_fill=(125, 123, 114),
    ),
}


def variant_named(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it should be one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]


class RandAugment:
    """Random ops of random magnitude, without the cutout that follows them.

    Args:
        num_ops: ops of an image, drawn with replacement from the 14; by default the variant's: 2 (fixmatch), 3
            (torchssl).
        probability: of applying each; by default the variant's: 0.5 (fixmatch), 1 (torchssl).
        variant: ranges of the magnitudes and the fill, "fixmatch" or "torchssl".
    """

    def __init__(
        self, num_ops: int | None = None, probability: float | None = None, *, variant: str = "fixmatch"
    ) -> None:
        recipe = variant_named(variant)
        self.variant = variant  # by name: a recipe has functions, which do not travel to loading processes
        self.num_ops = recipe.num_ops if num_ops is None else num_ops
        self.probability = recipe.probability if probability is None else probability
        if self.num_ops < 0:
            raise ValueError(f"num_ops is {num_ops}; it should be at least 0")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {probability}; it should be in [0, 1]")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        recipe = VARIANTS[self.variant]
        for _ in range(self.num_ops):
            name = _NAMES[rng.integers(len(_NAMES))]
            level = rng.random() if recipe.levels is None else int(rng.integers(1, recipe.levels)) / recipe.levels
            sign = -1 if name in SIGNED and rng.random() < 0.5 else 1
            if rng.random() < self.probability:
                magnitude = recipe.magnitudes[name](level) if name in recipe.magnitudes else 0.0
                image = OPS[name](image, sign * magnitude, recipe.fill)
        return image
