# SPDX-License-Identifier: BSD-3-Clause
"""The collectives of ssmkernels.distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from shards import assert_close, normal, shard
from torch import Tensor, nn
from traffic import counted

from ssmkernels import distributed
from ssmkernels.distributed import RowGather, all_gather_rows, gather_rows, gather_sizes, pack_rows, unpack_rows


def check_gather_on_first(group: dist.ProcessGroup) -> None:
    whole = normal(11, 3, seed=0)
    gathered = distributed.gather_on_first(whole[shard(11, group)], group=group)
    assert torch.equal(gathered, whole if dist.get_rank(group) == 0 else whole[:0])


def check_gather_rows_and_its_gradient(group: dist.ProcessGroup) -> None:
    whole, weights = normal(11, 3, seed=0), normal(11, 3, seed=1)
    own = shard(11, group)
    rows = whole[own].clone().requires_grad_()
    gathered = gather_rows(rows, group=group)
    assert gathered.equal(whole)
    assert all_gather_rows(rows, group=group).equal(whole)
    # Rank r's share of the loss is (r + 1) times the weighted sum.
    share = (dist.get_rank(group) + 1) * (gathered.pow(3) * weights).sum()
    (gradient,) = torch.autograd.grad(share, rows, create_graph=True)
    total = sum(range(1, dist.get_world_size(group) + 1))
    assert_close(gradient, total * 3 * (whole.square() * weights)[own])
    # The derivative of the sum over ranks of Σ gradient is that of the same function of all rows.
    (second,) = torch.autograd.grad(gradient.sum(), rows)
    assert_close(second, total * 6 * (whole * weights)[own])


def check_traffic_of_gather_rows(group: dist.ProcessGroup) -> None:
    ranks, rows, dim = dist.get_world_size(group), 6, 5
    x = torch.ones(rows if dist.get_rank(group) != 1 else 2, dim, dtype=torch.float32, requires_grad=True)
    with counted() as (calls, received):
        gather_rows(x, group=group).sum().backward()
    assert calls == {"all_gather": 2, "reduce_scatter": 1}
    assert received["all_gather"] == (ranks - 1) * (8 + rows * dim * 4)  # 8 bytes are a count; rows up to the most
    assert received["reduce_scatter"] == (ranks - 1) * rows * dim * 4


def check_row_gather_is_one_collective(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    gather = RowGather()
    for step, largest in enumerate((4, 3, 4, 7)):
        counts = [largest if place == 0 else (place + step) % 3 for place in range(ranks)]
        mine = (torch.full((counts[rank],), rank), torch.full((counts[rank], 3), rank + 0.5))
        with counted() as (calls, received):
            ids, values = gather(mine, group=group)
        expected = torch.repeat_interleave(torch.arange(ranks), torch.tensor(counts))
        assert ids.equal(expected)
        assert values.equal(expected[:, None].float().expand(-1, 3) + 0.5)
        again = step in (0, 3)  # a rank has more rows than any had before
        assert calls == {"all_gather": 2 if again else 1}
        bytes_of_row = 8 + 3 * 4
        before = {0: 1, 3: 1 + 4}.get(step, 0)
        sent = before + 1 + {0: 4, 1: 4, 2: 4, 3: 7}[step]
        assert received["all_gather"] == (ranks - 1) * sent * bytes_of_row


def check_packed_rows(group: dist.ProcessGroup) -> None:
    tensors: list[Tensor] = [
        torch.arange(3),
        normal(3, 2, seed=0),
        normal(3, 2, 2, seed=1, dtype=torch.bfloat16),
        torch.empty(3, 0),
        torch.tensor([True, False, True]),
        normal(2, 3, seed=2, dtype=torch.float32).t(),
    ]
    for rows in (3, 0):
        part = [tensor[:rows] for tensor in tensors]
        packed = pack_rows(part)
        assert packed.shape == (rows, 8 + 16 + 8 + 0 + 1 + 8)
        for unpacked, tensor in zip(unpack_rows(packed, tensors), part, strict=True):
            assert unpacked.dtype == tensor.dtype
            assert unpacked.equal(tensor)


class _SplitsItsInput(nn.Module):
    """Its buffer is the same on every rank; a method is named as other modules' attribute."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def split(self) -> None: ...


def check_on_four_buffers_are_those_of_the_first_rank(group: dist.ProcessGroup) -> None:
    module = _SplitsItsInput(dist.get_rank(group))
    distributed.broadcast_buffers(module)
    assert module.value == 0


def check_groups_and_sizes(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = gather_sizes([rank, 7], torch.device("cpu"), group=group)
    assert sizes == [[place, 7] for place in range(ranks)]
    distributed.agree_on(["the second"], [7], [size[1:] for size in sizes])
    with pytest.raises(ValueError, match=r"the first must be the same on every rank, got \d here and \[0, 1"):
        distributed.agree_on(["the first"], [rank], sizes)
    assert not distributed.is_split("local")
    assert distributed.is_split(group)
    with pytest.raises(TypeError, match="group must be a process group, None or 'local', got 3"):
        distributed.is_split(3)
