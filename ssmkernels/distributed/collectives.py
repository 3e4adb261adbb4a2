# SPDX-License-Identifier: BSD-3-Clause
"""Collectives on rows that the ranks of a group hold in different numbers, also none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Optional, TypeAlias, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

Group: TypeAlias = Optional[Union["torch.distributed.ProcessGroup", Literal["local"]]]  # noqa: UP045
"""Whose rows an op takes: of a process group, of the default group (None), or of this process alone ("local")."""


def check_group(group: object) -> None:
    """Raises a TypeError unless ``group`` is a :data:`Group`."""
    if group is None or (isinstance(group, str) and group == "local"):
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a process group, None or 'local', got {group!r}")


def process_group(group: Group) -> dist.ProcessGroup | None:
    """What the collectives of torch take for ``group``, which is not "local"."""
    assert not isinstance(group, str)
    return group


def is_distributed(group: Group = None) -> bool:
    """Whether ``group``, by default the default group, has more than one rank."""
    return world_size(group) > 1


def is_split(group: Group) -> bool:
    """Whether an op called with ``group`` is to communicate. Checks the argument."""
    if isinstance(group, str) and group == "local":
        return False
    check_group(group)
    return is_distributed(group)


def world_size(group: Group = None) -> int:
    """The number of ranks in ``group``, by default the default group; 1 without one."""
    if isinstance(group, str) or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def rank_of(group: Group = None) -> int:
    """This process's rank in ``group``, by default the default group; 0 without one."""
    if isinstance(group, str) or not (dist.is_available() and dist.is_initialized()):
        return 0
    return dist.get_rank(group)


def is_of_lost_rank(error: RuntimeError) -> bool:
    """Whether ``error`` says that a collective ended without another rank: NCCL has a class for it, Gloo words. The
    collective that waited too long names a file of Gloo, others that were under way do not.
    """
    message = str(error)
    of_gloo = ("gloo" in message and "/transport/" in message) or "Application timeout caused pair closure" in message
    return isinstance(error, dist.DistError) or of_gloo


def split_rows(count: int, rank: int, ranks: int) -> slice:
    """The rows of ``rank`` where ``count`` of them are dealt out in runs as equal as can be."""
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


@torch.no_grad()
def gather_sizes(sizes: Sequence[int], device: torch.device, *, group: Group = None) -> list[list[int]]:
    """A few integers of every rank, in rank order, by one collective of 8 bytes each; synchronises with the device."""
    if not is_distributed(group):
        return [list(sizes)]
    own = torch.tensor(sizes, dtype=torch.int64, device=device)
    everyone = own.new_empty(world_size(group) * len(own))
    dist.all_gather_into_tensor(everyone, own, group=process_group(group))
    return everyone.view(-1, len(own)).tolist()


def agree_on(names: Sequence[str], values: Sequence[int], gathered: Sequence[Sequence[int]]) -> None:
    """Raises a ValueError, on every rank, where one of these ``values`` is not the same on all.

    Args:
        names: of the values.
        values: of this rank.
        gathered: of every rank, as :func:`gather_sizes` gives them.
    """
    for place, name in enumerate(names):
        of_ranks = [values_of_rank[place] for values_of_rank in gathered]
        if any(value != of_ranks[0] for value in of_ranks):
            raise ValueError(f"{name} must be the same on every rank, got {values[place]} here and {of_ranks} by rank")


@torch.no_grad()
def all_gather_rows(tensor: Tensor, *, group: Group = None) -> Tensor:
    """The rows of every rank, in rank order: [n_r, ...] on rank r -> [Σ n_r, ...] on every rank. No gradient flows.

    Ranks may hold different numbers of rows, also none; the other sizes and the dtype must agree.
    """
    if not is_distributed(group):
        return tensor
    counts = [count for (count,) in gather_sizes([tensor.shape[0]], tensor.device, group=group)]
    return all_gather_counted(tensor, counts, group=group)


@torch.no_grad()
def all_gather_counted(tensor: Tensor, counts: Sequence[int], *, group: Group = None) -> Tensor:
    """:func:`all_gather_rows` where the number of rows of every rank is known: one collective, in which each rank sends
    as many rows as the one with the most.
    """
    most = max(counts)
    everyone = tensor.new_empty(len(counts) * most, *tensor.shape[1:])
    if everyone.numel() > 0:
        dist.all_gather_into_tensor(everyone, _padded(tensor, most), group=process_group(group))
    if all(count == most for count in counts):
        return everyone
    return torch.cat([part[:count] for part, count in zip(everyone.split(most), counts, strict=True)])


@torch.no_grad()
def gather_on_first(tensor: Tensor, *, group: Group = None) -> Tensor:
    """The rows of every rank on the first rank of the group, in rank order, and none on the others. As
    :func:`all_gather_rows` otherwise.
    """
    if not is_distributed(group):
        return tensor
    counts = [count for (count,) in gather_sizes([tensor.shape[0]], tensor.device, group=group)]
    own, of, is_first = _padded(tensor, max(counts)), process_group(group), rank_of(group) == 0
    parts = [torch.empty_like(own) for _ in counts] if is_first else None
    dist.gather(own, parts, dst=0 if of is None else dist.get_global_rank(of, 0), group=of)
    if parts is None:
        return tensor[:0]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _reduce_scatter(tensor: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The sum over ranks of [Σ n_r, ...], of which rank r gets its n_r rows."""
    most = max(counts)
    own = tensor.new_empty(most, *tensor.shape[1:])
    if own.numel() > 0:
        parts = [_padded(part, most) for part in tensor.split(list(counts))]
        dist.reduce_scatter_tensor(own, torch.cat(parts), group=process_group(group))
    return own[: counts[rank_of(group)]]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """The collectives want equal shapes."""
    if tensor.shape[0] == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    return padded


@torch.no_grad()
def exchange_rows(tensor: Tensor, counts: Sequence[int], *, group: Group = None) -> list[Tensor]:
    """Rows to every rank by one all_to_all: of ``tensor`` [Σ n_r, d], the rows n_r that are rank r's go there.

    Returns:
        What came from each rank, [n, d] each, where n is this rank's count.
    """
    if not is_distributed(group):
        return [tensor]
    own = counts[rank_of(group)]
    received = tensor.new_empty(len(counts) * own, *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.contiguous(), [own] * len(counts), list(counts), group=process_group(group))
    return [received[rank * own : (rank + 1) * own] for rank in range(len(counts))]


def gather_objects(own: Any, *, group: Group = None) -> list[Any]:
    """What every rank has, in rank order; pickled on the way."""
    if not is_distributed(group):
        return [own]
    everyone: list[Any] = [None] * world_size(group)
    dist.all_gather_object(everyone, own, group=process_group(group))
    return everyone


@torch.no_grad()
def send_rows(tensor: Tensor, counts: Sequence[int], *, group: Group = None) -> tuple[Tensor, list[int]]:
    """Rows to every rank, where no rank knows how many it gets: of ``tensor`` [Σ counts, ...], the first counts[0] go
    to rank 0, and so on. One all_to_all of 8 bytes a rank, and one of the rows.

    Returns:
        The rows that came, in rank order, and how many came from each rank.
    """
    if not is_distributed(group):
        return tensor, list(counts)
    ones = [1] * len(counts)
    given = torch.tensor(counts, dtype=torch.int64, device=tensor.device)
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, ones, ones, group=process_group(group))
    received = tensor.new_empty(int(taken.sum()), *tensor.shape[1:])
    sizes = taken.tolist()
    dist.all_to_all_single(received, tensor.contiguous(), sizes, list(counts), group=process_group(group))
    return received, sizes


@torch.no_grad()
def all_reduce_max(tensor: Tensor, *, group: Group = None) -> Tensor:
    """The largest over ranks of a tensor of the same shape on each, element by element. No gradient flows."""
    if not is_distributed(group):
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group(group))
    return largest


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, *, group: Group = None) -> Tensor:
    """The sum over ranks of a tensor of the same shape on each. No gradient flows."""
    if not is_distributed(group):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=process_group(group))
    return total


def all_reduce_mean(tensor: Tensor, *, group: Group = None) -> Tensor:
    """The mean over ranks of a floating-point tensor of the same shape on each. No gradient flows."""
    return all_reduce_sum(tensor, group=group) / world_size(group) if is_distributed(group) else tensor


@torch.no_grad()
def broadcast(tensor: Tensor, *, group: Group = None) -> Tensor:
    """What rank 0 of the group has for ``tensor``, of the same shape on each. Written in place, and returned."""
    if is_distributed(group):
        of = process_group(group)
        dist.broadcast(tensor, src=0 if of is None else dist.get_global_rank(of, 0), group=of)
    return tensor


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank the buffers of ``module`` that rank 0 has, as DDP does before each forward pass.

    Those of modules whose attribute ``buffers_differ_between_ranks`` is true stay: of them each rank has its own part.
    """
    if not is_distributed():
        return
    for part in module.modules():
        if not getattr(part, "buffers_differ_between_ranks", False):
            for buffer in part.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def gather_rows(x: Tensor, *, group: Group = None) -> Tensor:
    """The rows of every rank with gradient: [n_r, ...] on rank r -> [Σ n_r, ...] on every rank, in rank order.

    The backward is a reduce_scatter: the rows of rank r get the sum of what all ranks send back to them. Where every
    rank computes the same loss L of the gathered rows, that is world_size · ∂L/∂x; DDP, which takes the mean over ranks
    of the gradients of the parameters, makes of it the gradient of one process with the whole batch. Where every rank
    computes its share of L, it is ∂L/∂x. Differentiable any number of times.

    Ranks may hold different numbers of rows, also none; the other sizes and the dtype must agree.

    Args:
        x: [n_r, ...], floating point.
        group: the ranks; by default the default group, and x itself without one.
    """
    if not is_split(group):
        return x
    counts = [count for (count,) in gather_sizes([x.shape[0]], x.device, group=group)]
    return _GatherRows.apply(x, counts, group)


def for_ddp(loss: Tensor, *, group: Group = None) -> Tensor:
    """``loss`` with world_size times its gradient, where every rank has the loss of the rows of all ranks and the
    gradient of its own.

    DDP takes the mean over ranks of the gradients of the parameters; what each rank has of this loss is to be added up.
    """
    ranks = world_size(group)
    if ranks == 1 or not loss.requires_grad:
        return loss
    scaled = loss.clone()
    scaled.register_hook(lambda gradient: ranks * gradient)
    return scaled


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return all_gather_counted(rows, counts, group=group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _ReduceScatterRows.apply(gradient, ctx.counts, ctx.group), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _reduce_scatter(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _GatherRows.apply(gradient, ctx.counts, ctx.group), None, None
