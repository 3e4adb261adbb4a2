# SPDX-License-Identifier: BSD-3-Clause
"""Rows as the ranks of a test hold them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


def shard(count: int, group: dist.ProcessGroup, *, even: bool = False) -> slice:
    """This rank's run of ``count`` rows. Uneven: none on rank 1, the rest by 1, 2, … shares."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = [1] * ranks if even else [0 if place == 1 else 1 + place for place in range(ranks)]
    starts = [count * sum(shares[:place]) // sum(shares) for place in range(ranks + 1)]
    return slice(starts[rank], starts[rank + 1])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high: int, count: int, *, seed: int) -> Tensor:
    return torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCES[expected.dtype])
