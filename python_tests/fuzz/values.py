# SPDX-License-Identifier: BSD-3-Clause
"""What calls are made of: sizes, tensors of every kind of value and layout, and scalars of every type."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE_FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)
DTYPES = (*FLOATS, *INTEGERS, torch.int16, torch.uint8, torch.bool, torch.complex64)
# The product of two such numbers is representable.
LARGEST_EXPONENT = {torch.float32: 16, torch.float64: 145, torch.bfloat16: 16, torch.float16: 4}
WRITTEN = ("expanded", "negative bit", "conjugated")  # layouts that cannot be written
KINDS = ("normal", "normal", "unit rows", "integers", "zeros", "equal rows", "scaled", "denormal", "mixed")
LARGE = (31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def sizes(draw: Draw, count: int, least: int = 0) -> list[int]:
    """Mostly small; one of them may be up to 257, so that references which store all pairs stay cheap."""
    drawn = [draw(st.integers(least, 6)) for _ in range(count)]
    if draw(st.integers(0, 3)) == 3:
        drawn[draw(st.integers(0, count - 1))] = draw(st.integers(least, 40) | st.sampled_from(LARGE))
    return drawn


def dtype(draw: Draw, among: tuple[torch.dtype, ...] = FLOATS) -> torch.dtype:
    return draw(st.sampled_from(among))


def values(
    draw: Draw,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    least: float = -math.inf,
    without: tuple[str, ...] = (),
    exponent: int | None = None,
) -> Tensor:
    """Finite numbers of one kind, in some layout; with ``least`` 0, none is negative.

    ``exponent`` is the largest power of ten in the "mixed" kind, where it is not that of the dtype.
    """
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 9))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    largest = LARGEST_EXPONENT[dtype]
    if kind == "unit rows" and len(shape):
        numbers = numbers / torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
    elif kind == "integers":
        numbers = (2 * numbers).round()
    elif kind == "zeros":
        numbers = torch.where(numbers > 0, 0.0, -0.0).double()
    elif kind == "equal rows" and len(shape):
        numbers = numbers[:1].expand(shape)
    elif kind == "scaled":
        numbers = numbers * 10.0 ** draw(st.integers(-largest, largest))
    elif kind == "denormal":
        numbers = numbers * torch.finfo(dtype).tiny / 8
    elif kind == "mixed":
        numbers = numbers.sign() * 10.0 ** (numbers.abs().remainder(1) * 2 - 1).mul(exponent or largest)
    numbers = numbers.abs() if least == 0 else numbers
    return layout(draw, numbers.to(dtype), without=without)


def classes(
    draw: Draw, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.int64, *, without: tuple[str, ...] = ()
) -> Tensor:
    """Integers in [0, count)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    numbers = torch.randint(max(count, 1), shape, generator=generator)
    if draw(st.booleans()):
        numbers = numbers.sort(dim=0).values
    return layout(draw, numbers.to(dtype), without=without)


def layout(draw: Draw, value: Tensor, *, without: tuple[str, ...] = ()) -> Tensor:
    """The same values otherwise in memory, where a read of what lies between them would be noticed.

    "expanded" repeats the first row, at stride 0.
    """
    names = [name for name in LAYOUTS if name not in without]
    return LAYOUTS[draw(st.sampled_from(["contiguous"] * len(names) + names))](value)


def _filler(value: Tensor) -> Any:
    return math.nan if value.is_floating_point() else torch.iinfo(value.dtype).min


def _transposed(value: Tensor) -> Tensor:
    return value.t().contiguous().t() if value.ndim == 2 else value


def _strided(value: Tensor) -> Tensor:
    return torch.stack([value, torch.full_like(value, _filler(value))], dim=-1)[..., 0]


def _offset(value: Tensor) -> Tensor:
    buffer = torch.full((value.numel() + 2,), _filler(value), dtype=value.dtype)
    buffer[1:-1] = value.flatten()
    return buffer[1:-1].view(value.shape)


def _expanded(value: Tensor) -> Tensor:
    return value[:1].expand(value.shape) if value.ndim else value


def _negative_bit(value: Tensor) -> Tensor:
    return torch._neg_view(-value)


def _conjugated(value: Tensor) -> Tensor:
    """The imaginary part of a conjugate: strided, with the negative bit."""
    if value.dtype not in WIDE_FLOATS:
        return value
    return torch.complex(torch.full_like(value, math.nan), -value).conj().imag


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
    "negative bit": _negative_bit,
    "conjugated": _conjugated,
}


@dataclass(frozen=True)
class Number:
    """What a scalar argument may be. ``usual`` are values that make sensible calls."""

    usual: tuple[float, ...]
    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is out
    below: bool = False  # most itself is out
    integer: bool = False
    optional: bool = False
    infinite: bool = False  # may be infinite
    shapes: bool = False  # decides how large the result is: huge numbers are not tried

    def draw(self, draw: Draw) -> Any:
        value = draw(st.sampled_from(self.usual))
        if self.optional and draw(st.integers(0, 3)) == 0:
            return None
        return draw(st.sampled_from(_types_of(value)))(value)

    def accepts(self, value: object) -> bool | None:
        """Whether the value has to be accepted (True) or refused (False); None where either will do."""
        if value is None:
            return self.optional
        if isinstance(value, (bool, np.bool_, str, bytes, complex, list, tuple)) or type(value) is object:
            return False
        if isinstance(value, (Tensor, np.ndarray)):
            return False if value.ndim or (self.integer and not _is_integer(value)) else None
        if self.integer and not isinstance(value, (int, np.integer)):
            return False
        number: Any = value
        if not (self.integer and isinstance(value, int)):  # which Python compares with a float as it is
            try:
                number = float(value)  # type: ignore[arg-type]
            except OverflowError:
                number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
        if number != number or (number in (math.inf, -math.inf) and not self.infinite):
            return False
        if not self.least <= number <= self.most or (self.above and number == self.least):
            return False
        if self.below and number == self.most:
            return False
        return True if isinstance(value, (int, float, np.integer, np.floating)) and abs(number) < 2.0**62 else None

    def meant(self, value: Any) -> Any:
        """The Python number that an accepted value stands for."""
        if value is None or isinstance(value, str):
            return value
        return operator.index(value) if self.integer else float(value)


def _is_integer(value: Tensor | np.ndarray) -> bool:
    return np.issubdtype(np.asarray(value).dtype, np.integer)


def _types_of(value: float) -> list[Callable[[float], Any]]:
    if isinstance(value, int):
        return [int, int, np.int64, np.int32]
    return [float, float, np.float64] + [np.float32] * bool(np.float32(value) == value)


def odd_scalars(number: Number) -> st.SearchStrategy[Any]:
    """Scalars of every type and size, most of them out of place."""
    others = [
        True,
        False,
        None,
        "1",
        b"1",
        1j,
        [1],
        object(),
        math.nan,
        math.inf,
        -math.inf,
        0,
        1,
        2,
        -1,
        -1.0,
        0.0,
        -0.0,
        0.5,
        1.5,
    ]
    others += [
        Fraction(1, 3),
        Decimal("0.5"),
        np.bool_(True),
        np.float64(0.5),
        np.float32(1.0),
        np.float16(0.5),
        np.float64(math.nan),
    ]
    others += [np.int8(1), np.int64(-1), np.uint8(2), np.array(0.5), np.array([1]), np.longdouble(1.0)]
    others += [torch.tensor(0.5), torch.tensor(1), torch.tensor([0.5]), torch.tensor(math.nan), torch.tensor(True)]
    if not number.shapes:
        others += [1e-300, 1e-320, 1e300, 10**400, -(10**400), 2**63, -(2**63) - 1, np.uint64(2**63)]
    return st.sampled_from(others)
