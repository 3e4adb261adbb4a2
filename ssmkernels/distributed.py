# SPDX-License-Identifier: BSD-3-Clause
"""The collectives that modules and trainers share. Each is the identity where ``torch.distributed`` is not
initialised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of every rank, in rank order: [n_r, ...] on rank r -> [Σ n_r, ...] on every rank. No gradient flows.

    Ranks may hold different numbers of rows, also none; the other sizes and the dtype must agree.
    """
    if not is_distributed():
        return tensor
    rows = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, rows)
    sizes = torch.cat(counts).tolist()
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # the collective wants equal shapes
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a tensor of the same shape on each. No gradient flows."""
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor of the same shape on each. No gradient flows."""
    return all_reduce_sum(tensor) / dist.get_world_size() if is_distributed() else tensor


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank the buffers of ``module`` that rank 0 has, as DDP does before each forward pass."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_rows(tensor: Tensor) -> Tensor:
    """As :func:`all_gather_rows`, with gradient: the rows of rank r get what all ranks together send back to them.

    Where every rank computes the same loss L of the gathered rows, that is world_size · ∂L/∂rows; DDP, which takes the
    mean over ranks of the gradients of the parameters, makes of it the gradient of one process with the whole batch.
    """
    return _GatherRows.apply(tensor) if is_distributed() else tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        before = all_gather_rows(torch.tensor([tensor.shape[0]], device=tensor.device))[: dist.get_rank()]
        ctx.first, ctx.rows = int(before.sum()), tensor.shape[0]
        return all_gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous())[ctx.first : ctx.first + ctx.rows]
