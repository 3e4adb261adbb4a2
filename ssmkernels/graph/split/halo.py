# SPDX-License-Identifier: BSD-3-Clause
"""Which rows the ranks of a split graph exchange, and the exchange.

A rank needs the values of its ghosts: the nodes of other ranks that its rows have entries for. The graph is symmetric,
so a rank that needs a node of another also has a node that the other needs: each finds what to send in its own rows,
and nothing has to be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmkernels.distributed import Group, is_distributed
from ssmkernels.distributed.collectives import process_group


@dataclass(frozen=True)
class Halo:
    """The exchange plan of one rank.

    Args:
        group: the ranks.
        sent: [s] int64, own rows: first those that rank 0 needs, ascending, then those of rank 1 and so on.
        send_counts: how many of them go to each rank.
        receive_counts: how many ghosts come from each rank; they ascend.
    """

    group: Group
    sent: Tensor
    send_counts: list[int]
    receive_counts: list[int]

    def start(self, values: Tensor, ghosts: Tensor) -> Any:
        """Begins to fill ``ghosts`` [g, …] from ``values`` [n, …] of every rank, by one all_to_all; the result has a
        ``wait()``, and what is returned with it stays in memory until then.
        """
        if not is_distributed(self.group):
            return None
        return dist.all_to_all_single(
            ghosts,
            values[self.sent].contiguous(),
            self.receive_counts,
            self.send_counts,
            group=process_group(self.group),
            async_op=True,
        )

    def extend(self, values: Tensor) -> Tensor:
        """``values`` [n, …] of own rows, and behind them those of the ghosts: [n + g, …]."""
        count = len(values)
        extended = values.new_empty(count + sum(self.receive_counts), *values.shape[1:])
        extended[:count] = values
        request = self.start(values, extended[count:])
        if request is not None:
            request.wait()
        return extended


def plan(group: Group, rows: Tensor, owners: Tensor, ghost_owners: Tensor, ranks: int) -> Halo:
    """The plan of a rank.

    Args:
        rows: [cut] own row of every entry whose column another rank owns.
        owners: [cut] that rank.
        ghost_owners: [g] the rank of every ghost.
    """
    width = int(rows.max()) + 1 if len(rows) else 1
    needed = torch.unique(owners * width + rows)
    send_counts = torch.bincount((needed // width).cpu(), minlength=ranks).tolist()
    receive_counts = torch.bincount(ghost_owners.cpu(), minlength=ranks).tolist()
    return Halo(group, needed % width, send_counts, receive_counts)


def extend(halo: Halo, values: Tensor) -> Tensor:
    """:meth:`Halo.extend` with gradient: what comes for a ghost goes back to the rank that has the row, and is added
    there.
    """
    return _Extend.apply(values, halo)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        return halo.extend(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        halo: Halo = ctx.halo
        rows = len(gradient) - sum(halo.receive_counts)
        own = gradient[:rows].clone()
        if is_distributed(halo.group):
            returned = gradient.new_empty(len(halo.sent), *gradient.shape[1:])
            counts = halo.send_counts, halo.receive_counts
            dist.all_to_all_single(returned, gradient[rows:].contiguous(), *counts, group=process_group(halo.group))
            own.index_add_(0, halo.sent, returned)
        return own, None
