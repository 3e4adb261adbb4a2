# SPDX-License-Identifier: BSD-3-Clause
"""Checks of values: those the library makes where the values lie, and those torch makes for other dtypes, layouts and transforms."""

from __future__ import annotations

import math

import pytest
import torch

from ssmkernels.ops import _checks as check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layouts(values):
    """The same values contiguous, and every second one of a larger tensor whose others would fail every check."""
    spaced = torch.full((2 * len(values),), math.nan if values.is_floating_point() else -1, dtype=values.dtype)
    spaced[::2] = values
    return values, spaced[::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 999])
def test_one_bad_value_is_found(dtype, bad, at):
    good = torch.linspace(0, 1, 1000).to(dtype)
    wrong = good.clone()
    wrong[at] = bad
    for fine, found in zip(layouts(good), layouts(wrong), strict=True):
        check.check_finite("x", fine)
        check.check_weights("x", fine)
        with pytest.raises(ValueError, match=r"^x must be finite, got values from"):
            check.check_finite("x", found)
        with pytest.raises(ValueError, match=r"^x must be finite and >= 0, got values from"):
            check.check_weights("x", found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_a_dtype_are_finite(dtype):
    ends = torch.tensor([torch.finfo(dtype).min, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    for values in layouts(ends):
        check.check_finite("x", values)
        check.check_weights("x", values[1:])
        with pytest.raises(ValueError, match=">= 0"):
            check.check_weights("x", values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ranges_of_ids(dtype):
    ids = torch.arange(10, dtype=dtype)
    for values in layouts(ids):
        check.check_range("ids", values, 10, "ten")
        with pytest.raises(ValueError, match=r"^ids must be in \[0, 9\), nine; got values from 0 to 9"):
            check.check_range("ids", values, 9, "nine")
        with pytest.raises(ValueError, match="got values from -1 to 8"):
            check.check_range("ids", values - 1, 10, "ten")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_starts_of_rows_ascend(dtype):
    for values in layouts(torch.tensor([0, 2, 2, 5], dtype=dtype)):
        assert check.ascends_from_zero(values, 5)
        assert not check.ascends_from_zero(values, 4)
        assert not check.ascends_from_zero(values + 1, 6)
    for values in layouts(torch.tensor([0, 3, 2, 5], dtype=dtype)):
        assert not check.ascends_from_zero(values, 5)
    assert not check.ascends_from_zero(torch.empty(0, dtype=dtype), 0)


def test_nothing_is_in_order():
    for dtype in DTYPES:
        check.check_finite("x", torch.empty(0, dtype=dtype))
        check.check_weights("x", torch.empty(0, dtype=dtype))
    check.check_range("x", torch.empty(0, dtype=torch.int64), 0, "nothing")


def test_values_are_found_under_a_transform():
    def loss(x):
        check.check_finite("x", x)
        return (x * x).sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.arange(3.0)), 2 * torch.arange(3.0))
    with pytest.raises(ValueError, match=r"^x must be finite"):
        torch.func.grad(loss)(torch.tensor([1.0, math.nan]))
