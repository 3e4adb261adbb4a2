# SPDX-License-Identifier: BSD-3-Clause
"""Crops of photographs of any size, cut out and resized to uint8 tensors; for loading processes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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

    @property
    def channels(self) -> int:
        """Of its crops: files become RGB, arrays stay as they are."""
        return len(self.image.getbands()) if self.image.format is None else 3

    def crops(self, boxes: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Tensor]:
        """Some parts of it, resized to squares: [C, size, size] uint8 each.

        Args:
            boxes: left, top, right and bottom in pixels.
            sizes: sides of the squares in pixels.
        """
        squares = [torch.empty((size, size, self.channels), dtype=torch.uint8) for size in sizes]
        self.cut(boxes, squares)
        return [square.permute(2, 0, 1) for square in squares]

    def cut(self, boxes: Sequence[np.ndarray], squares: Sequence[Tensor]) -> None:
        """Writes such parts to ``squares``, [size, size, C] uint8 each."""
        reduction = self._reduction(boxes, [len(square) for square in squares]) if self.image.format == "JPEG" else 1
        if reduction > 1:
            width, height = self.size
            self.image.draft("RGB", (width // reduction, height // reduction))
            reduced = self.image.convert("RGB")
            for box, square in zip(boxes, squares, strict=True):
                square.copy_(resized_part(reduced, box / reduction, len(square)).permute(1, 2, 0))
            return
        pixels = self.pixels()
        for box, square in zip(boxes, squares, strict=True):
            left, top, right, bottom = box.tolist()
            # What torch.nn.functional.interpolate calls, with a place for the result.
            torch.ops.aten._upsample_bilinear2d_aa.out(
                pixels[None, :, top:bottom, left:right],
                square.shape[:2],
                align_corners=False,
                out=square.permute(2, 0, 1)[None],
            )

    def pixels(self) -> Tensor:
        """All of it, [C, H, W] uint8."""
        if self.bytes and self.image.format == "JPEG" and self.image.mode in ("RGB", "L") and _decode_jpeg is not None:
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
