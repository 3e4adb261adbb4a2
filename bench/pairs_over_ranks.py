# SPDX-License-Identifier: BSD-3-Clause
"""What a loss over the pairs of the rows of all ranks costs a rank: memory, bytes received and CPU time.

torchrun --nproc_per_node 4 bench/pairs_over_ranks.py [--rows 1024] [--dim 128]

The contrastive loss of SLADE, forward and backward: rows that go round in blocks (``group=``), all rows on every rank
(``gather_rows``), and, where it is installed, pytorch-metric-learning's loss in its DistributedLossWrapper. The last
column is how far the gradient of a rank's rows is from that of one process, relative to its norm. Memory is the highest
resident size during the call less that before it; of Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ssmkernels.distributed import all_gather_rows, all_reduce_max, gather_rows, rank_of, split_rows, world_size
from ssmkernels.nn import ContrastiveLoss

MARGINS = (0.1, 1.2)


def resident(name: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since it was reset."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that come from other ranks, call by call; of an all_reduce its payload."""
    received: list[int] = []
    calls: dict[str, Any] = {}

    def counting(name: str, bytes_of: Callable[..., int]) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            received.append(bytes_of(*args))
            return function(*args, **options)

        return call

    ranks = world_size()
    calls["all_gather"] = counting("all_gather", lambda parts, own: (ranks - 1) * size(own))
    calls["all_gather_into_tensor"] = counting("all_gather_into_tensor", lambda whole, own: size(whole) - size(own))
    calls["reduce_scatter_tensor"] = counting("reduce_scatter_tensor", lambda own, whole: size(whole) - size(own))
    calls["all_reduce"] = counting("all_reduce", size)
    calls["batch_isend_irecv"] = counting(
        "batch_isend_irecv",
        lambda operations: sum(size(operation.tensor) for operation in operations if operation.op is dist.irecv),
    )
    with mock.patch.multiple(dist, **calls):
        yield received


def methods() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By name: (own rows, own labels) -> the loss, whose gradient is scaled as DDP wants it."""
    around, whole = ContrastiveLoss(*MARGINS, group=None), ContrastiveLoss(*MARGINS)
    by_name: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "group=: blocks go round": lambda rows, labels: around(rows, labels) * world_size(),
        "gather_rows: all on every rank": lambda rows, labels: whole(gather_rows(rows), all_gather_rows(labels)),
    }
    if importlib.util.find_spec("pytorch_metric_learning") is not None:
        from pytorch_metric_learning.losses import ContrastiveLoss as Theirs
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        for efficient in (False, True):
            name = f"DistributedLossWrapper(efficient={efficient})"
            by_name[name] = DistributedLossWrapper(Theirs(*MARGINS), efficient=efficient)
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="of a rank")
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = world_size()
    draw = torch.Generator().manual_seed(0)
    everything = torch.randn(ranks * options.rows, options.dim, generator=draw)
    labels = torch.arange(len(everything)) % (len(everything) // 8)
    own = split_rows(len(everything), rank_of(), ranks)
    x = everything.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ContrastiveLoss(*MARGINS)(x, labels), x)
    expected = expected[own]
    lines = []
    for name, method in methods().items():
        rows, own_labels = everything[own].clone().requires_grad_(), labels[own].clone()
        method(rows, own_labels).backward()  # what is loaded and allocated once
        rows.grad = None
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, begun = resident("VmRSS"), time.process_time()
        with counted() as received:
            method(rows, own_labels).backward()
        seconds, used = time.process_time() - begun, resident("VmHWM") - before
        assert rows.grad is not None
        error = float((rows.grad / ranks - expected).norm() / expected.norm())
        figures = all_reduce_max(torch.tensor([used, sum(received), seconds, error], dtype=torch.float64)).tolist()
        lines.append(
            f"{name:40} {figures[0] / 2**20:6.1f} {figures[1] / 2**20:12.2f} {figures[2]:8.2f} {figures[3]:9.1e}"
        )
    if rank_of() == 0:
        print(f"{options.rows} rows of {options.dim} on each of {ranks} ranks; the most of any rank")
        print(f"{'':40} {'MiB':>6} {'received MiB':>12} {'s of CPU':>8} {'gradient':>9}")
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
