# SPDX-License-Identifier: BSD-3-Clause
"""The operators of conjugate gradients on split rows: what holds of every op, for those that are not public."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmkernels.ops import _laplacian_rows as kernels

ROWS, GHOSTS = 300, 40  # rows for three chunks
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(dtype: torch.dtype) -> kernels.Matrix:
    """Rows with 0 to 8 entries, a tenth of them of ghosts."""
    counts = torch.arange(ROWS) % 9
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    col = torch.randint(ROWS + GHOSTS, (int(crow[-1]),), generator=torch.Generator().manual_seed(0)).int()
    return kernels.Matrix(crow, col, normal(len(col), seed=1, dtype=dtype), normal(ROWS, seed=2, dtype=dtype))


def vectors(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x of rows and ghosts, r and D⁻¹."""
    x = normal(ROWS + GHOSTS, columns, seed=3, dtype=dtype)
    return x, normal(ROWS, columns, seed=4, dtype=dtype), normal(ROWS, seed=5, dtype=dtype).abs()


def product(of: kernels.Matrix, x: Tensor, *, magnitudes: bool = False) -> Tensor:
    """A x in float64, or the sums of the magnitudes of its terms."""
    x = x.double()
    row = torch.repeat_interleave(torch.arange(ROWS), of.crow.diff())
    terms = of.value.double()[:, None] * (x[row] - x[of.col.long()])
    own = of.excess.double()[:, None] * x[:ROWS]
    if magnitudes:
        terms, own = terms.abs(), own.abs()
    return own.index_add(0, row, terms)


@DTYPES
@pytest.mark.parametrize("columns", [1, 3, 8, 37, 70])
def test_rows_and_sums(columns, dtype):
    of, (x, r, inverse) = matrix(dtype), vectors(columns, dtype)
    chosen = torch.arange(ROWS).flip(0)[::2]
    out = torch.full((ROWS, columns), 7, dtype=dtype)
    sums = kernels.multiply_rows_(out, of, chosen, x, r, inverse)
    # A row has at most 9 terms, each of which takes two roundings and 8 additions; a sum is of 128 of them at most in
    # the dtype, and the rest in float64.
    eps = torch.finfo(dtype).eps
    error = (out[chosen].double() - product(of, x)[chosen]).abs()
    assert bool((error <= 10 * eps * product(of, x, magnitudes=True)[chosen]).all())
    assert bool((out[::2] == 7).all())
    wide, z = out[chosen].double(), inverse.double()[:, None] * r.double()
    parts = wide * x[chosen].double(), r[chosen].double() * x[chosen].double(), z[chosen].square()
    for actual, part in zip(sums, parts, strict=True):
        assert bool(((actual - part.sum(dim=0)).abs() <= 132 * eps * part.abs().sum(dim=0)).all())


@DTYPES
def test_product_in_double(dtype):
    of, x = matrix(dtype), vectors(5, torch.float64)[0]
    sums, terms = kernels.multiply_in_double(of, x)
    bound = 1e-15 * product(of, x, magnitudes=True)
    assert bool(((sums - product(of, x)).abs() <= 10 * bound).all())
    assert bool(((terms - product(of, x, magnitudes=True)).abs() <= 10 * bound).all())


def step_arguments(columns: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    r, p, s, u, w = (normal(ROWS, columns, seed=10 + place, dtype=dtype) for place in range(5))
    x, step = normal(ROWS, columns, seed=20, dtype=torch.float64), normal(ROWS, seed=21, dtype=dtype)
    fresh = (torch.arange(columns) % 2).to(dtype)
    beta, alpha = normal(2, columns, seed=22, dtype=dtype)
    return x, r, p, s, u, w, step, fresh, beta, alpha


@DTYPES
@pytest.mark.parametrize("columns", [1, 13, 64])
def test_step(columns, dtype):
    x, r, p, s, u, w, step, fresh, beta, alpha = (value.double() for value in step_arguments(columns, dtype))
    p_new, s_new = fresh * u + beta * p, fresh * w + beta * s
    expected = x + alpha * p_new, r - alpha * s_new, p_new, s_new, step[:, None] * (r - alpha * s_new)
    given = step_arguments(columns, dtype)
    kernels.step_(
        *given[:5],
        **dict(zip(("w", "step", "fresh", "beta", "alpha"), given[5:], strict=True)),
    )
    for actual, value in zip(given[:5], expected, strict=True):  # of numbers up to 5 each
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=500 * torch.finfo(dtype).eps)


@DTYPES
def test_bits_do_not_depend_on_threads(dtype):
    of, (x, r, inverse) = matrix(dtype), vectors(200, dtype)

    def everything():
        out = torch.zeros(ROWS, 200, dtype=dtype)
        sums = kernels.multiply_rows_(out, of, torch.arange(ROWS), x, r, inverse)
        return out, sums, *kernels.multiply_in_double(of, x.double())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        torch.set_num_threads(4)
        second = everything()
    finally:
        torch.set_num_threads(before)
    assert all(mine.equal(other) for mine, other in zip(first, second, strict=True))


@DTYPES
def test_opcheck(dtype):
    of, (x, r, inverse) = matrix(dtype), vectors(3, dtype)
    operators = torch.ops.ssmkernels
    rows = torch.arange(ROWS)
    torch.library.opcheck(operators.laplacian_rows_.default, (torch.zeros_like(r), *of, rows, x, r, inverse))
    torch.library.opcheck(operators.laplacian_step_.default, step_arguments(3, dtype))
    torch.library.opcheck(operators.laplacian_residual.default, (*of, x.double()))


def test_wrong_arguments():
    of, (x, r, inverse) = matrix(torch.float32), vectors(3, torch.float32)
    rows, out = torch.arange(ROWS), torch.zeros(ROWS, 3)
    with pytest.raises(RuntimeError, match="shares memory"):
        kernels.multiply_rows_(x[:ROWS], of, rows, x, r, inverse)
    with pytest.raises(RuntimeError, match="a row for every row of the matrix"):
        kernels.multiply_rows_(out, of, rows, x[: ROWS - 1], r, inverse)
    with pytest.raises(RuntimeError, match=r"out must be \[300, 3\]"):
        kernels.multiply_rows_(out[1:], of, rows, x, r, inverse)
    with pytest.raises(RuntimeError, match="rows has the wrong dtype"):
        kernels.multiply_rows_(out, of, rows.int(), x, r, inverse)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        kernels.multiply_rows_(torch.zeros(3, ROWS).t(), of, rows, x, r, inverse)


def test_rows_and_columns_that_are_not_there_are_left_out():
    of, (x, r, inverse) = matrix(torch.float32), vectors(3, torch.float32)
    expected, out = torch.zeros(ROWS, 3), torch.zeros(ROWS, 3)
    kernels.multiply_rows_(
        expected, of._replace(value=torch.where(of.col < 9, of.value, 0)), torch.arange(2), x, r, inverse
    )
    far = of._replace(col=torch.where(of.col < 9, of.col, 2**30))
    sums = kernels.multiply_rows_(out, far, torch.tensor([0, -1, 1, ROWS, 2**40]), x, r, inverse)
    assert out.equal(expected)
    assert sums.isfinite().all()
