# SPDX-License-Identifier: BSD-3-Clause
"""The operators behind knn_graph and retrieval: what holds of every op, for those that are not public."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmkernels.ops import _neighbours as kernels


def draw(rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lists(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return kernels.nearest(draw(70, 5, dtype), 6)


CALLS = {
    "nearest_neighbours": (
        lambda dtype: (draw(50, 7, dtype), None, None, 5),
        lambda dtype: (draw(50, 7, dtype), draw(90, 7, dtype, 1), draw(90, 1, dtype, 2)[:, 0], 90),
    ),
    "pair_products": (lambda dtype: (draw(50, 7, dtype), torch.arange(50), torch.arange(50).flip(0)),),
    "symmetric_graph": (lists,),
}
EVERY = pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, variants in CALLS.items() for arguments in variants]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@EVERY
@DTYPES
def test_opcheck(name, arguments, dtype):
    torch.library.opcheck(getattr(torch.ops.ssmkernels, name).default, arguments(dtype))


@DTYPES
def test_bits_do_not_depend_on_threads(dtype):
    """Large enough for several threads."""
    rows, columns, offsets = draw(2000, 33, dtype), draw(1500, 33, dtype, 1), draw(1500, 1, dtype, 2)[:, 0]

    def everything():
        within, across = kernels.nearest(rows, 40), kernels.nearest(rows, 40, columns=columns, offsets=offsets)
        return *within, *across, *kernels.symmetric_graph(*within)

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
def test_strides_and_offsets(dtype):
    rows = draw(60, 8, dtype)
    expected = kernels.nearest(rows, 5)
    for same in (rows.t().contiguous().t(), torch.cat([rows, rows], dim=1)[:, :8]):
        assert all(mine.equal(other) for mine, other in zip(kernels.nearest(same, 5), expected, strict=True))


WRONG = [
    (lambda rows: (rows, None, None, 20), r"neighbours must be in \[1, 19\]"),
    (lambda rows: (rows, None, None, 0), r"neighbours must be in \[1, 19\]"),
    (lambda rows: (rows, rows, None, 21), r"neighbours must be in \[1, 20\]"),
    (lambda rows: (rows, rows[:, :2], None, 3), r"columns must be \[M, 4\]"),
    (lambda rows: (rows, rows.double(), None, 3), r"columns has the wrong dtype"),
    (lambda rows: (rows, None, rows[:3, 0], 3), r"offsets must be \[20\]"),
    (lambda rows: (rows[0], None, None, 3), r"rows must be \[N, D\]"),
    (lambda rows: (rows.half(), None, None, 3), r"expected float32 or float64"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssmkernels.nearest_neighbours(*arguments(draw(20, 4, torch.float32)))


def test_products_of_rows_that_are_not_there():
    with pytest.raises(RuntimeError, match=r"left and right must be in \[0, N\)"):
        kernels.pair_products(draw(3, 2, torch.float32), torch.tensor([0]), torch.tensor([3]))
