# SPDX-License-Identifier: BSD-3-Clause
"""Counts what a rank receives: messages and bytes of each collective, from the other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(calls, bytes received) by the name of the collective. An all_reduce counts with its payload."""
    calls: Counter[str] = Counter()
    received: Counter[str] = Counter()

    def count(name: str, size: int) -> None:
        calls[name] += 1
        received[name] += size

    collectives = {
        name: getattr(dist, name)
        for name in ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor", "all_reduce")
    }
    send_and_receive = dist.batch_isend_irecv

    def all_gather_into_tensor(output: Tensor, own: Tensor, **options: Any) -> Any:
        count("all_gather", _size(output) - _size(own))
        return collectives["all_gather_into_tensor"](output, own, **options)

    def all_to_all_single(output: Tensor, own: Tensor, counts_in: list[int], *rest: Any, **options: Any) -> Any:
        kept = counts_in[dist.get_rank(options["group"])]
        count("all_to_all", _size(output) - _size(output[:kept]))
        return collectives["all_to_all_single"](output, own, counts_in, *rest, **options)

    def reduce_scatter_tensor(output: Tensor, own: Tensor, **options: Any) -> Any:
        count("reduce_scatter", _size(own) - _size(output))
        return collectives["reduce_scatter_tensor"](output, own, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        count("all_reduce", _size(tensor))
        return collectives["all_reduce"](tensor, **options)

    def batch_isend_irecv(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                count("receive", _size(operation.tensor))
        return send_and_receive(operations)

    with mock.patch.multiple(
        dist,
        all_gather_into_tensor=all_gather_into_tensor,
        all_to_all_single=all_to_all_single,
        reduce_scatter_tensor=reduce_scatter_tensor,
        all_reduce=all_reduce,
        batch_isend_irecv=batch_isend_irecv,
    ):
        yield calls, received
