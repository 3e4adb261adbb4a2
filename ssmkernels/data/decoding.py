# SPDX-License-Identifier: BSD-3-Clause
"""Crops of photographs of any size, cut out and resized to uint8 tensors; for loading processes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssmkernels.data.images import ImageDataset, file_of

_RGB = 3
"""``torchvision.io.ImageReadMode.RGB``."""


class Photograph:
    """An image of a data set whose size is known before it is decoded.

    A JPEG file is decoded by torchvision, whose bits are Pillow's at two thirds of the time; or by Pillow at a half, a
    quarter or an eighth of its size where the crops that are wanted are made smaller by as much anyway.
    """

    def __init__(self, dataset: ImageDataset, index: int) -> None:
        path = file_of(dataset, index)
        self.bytes = b"" if path is None else Path(path).read_bytes()
        self.image = dataset.image(index) if path is None else Image.open(io.BytesIO(self.bytes))
        self.size = self.image.size

    def crops(self, boxes: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Tensor]:
        """Some parts of it, resized to squares: [C, size, size] uint8 each.

        Args:
            boxes: left, top, right and bottom in pixels.
            sizes: sides of the squares in pixels.
        """
        if self.image.format == "JPEG":
            reduction = self._reduction(boxes, sizes)
            if reduction > 1:
                width, height = self.size
                self.image.draft("RGB", (width // reduction, height // reduction))
                reduced = self.image.convert("RGB")
                return [resized_part(reduced, box / reduction, size) for box, size in zip(boxes, sizes, strict=True)]
        pixels = self.pixels()
        return [_resized(pixels, box, size) for box, size in zip(boxes, sizes, strict=True)]

    def pixels(self) -> Tensor:
        """All of it, [C, H, W] uint8."""
        if self.image.format == "JPEG" and self.image.mode in ("RGB", "L") and _decode_jpeg is not None:
            try:
                encoded = torch.frombuffer(bytearray(self.bytes), dtype=torch.uint8)
                decoded: Tensor = _decode_jpeg(encoded, _RGB, False)
                return decoded
            except RuntimeError:
                pass  # Pillow reads more files than torchvision, and says what is wrong with the others
        return _to_tensor(self.image if self.image.format is None else self.image.convert("RGB"))

    def _reduction(self, boxes: Sequence[np.ndarray], sizes: Sequence[int]) -> int:
        """The largest of 8, 4, 2 and 1 by which every box can be reduced and still has the pixels of its square."""
        sides = (min(box[2] - box[0], box[3] - box[1]) / size for box, size in zip(boxes, sizes, strict=True))
        least = min(sides)
        return next((reduction for reduction in (8, 4, 2) if least >= reduction), 1)


def resized_part(image: Image.Image, box: Sequence[float] | np.ndarray, size: int) -> Tensor:
    """A part of an image, resized bilinearly to a square: [C, size, size] uint8."""
    left, top, right, bottom = (float(side) for side in box)
    return _to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def _resized(pixels: Tensor, box: np.ndarray, size: int) -> Tensor:
    left, top, right, bottom = box.tolist()
    part = pixels[None, :, top:bottom, left:right]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _jpeg_decoder() -> torch._ops.OpOverloadPacket | None:
    """Torchvision's operator itself: ``torchvision.io.decode_jpeg`` warns that it will leave torchvision."""
    try:
        import torchvision.io  # noqa: F401

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None


_decode_jpeg = _jpeg_decoder()
