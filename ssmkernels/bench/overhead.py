# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of small calls: what a call costs besides its kernels, with built-in ops of torch as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmkernels import ops
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function
from ssmkernels.graph import knn_graph

ROWS, DIM, SLOTS, CLASSES = 64, 128, 250, 10
Calls = list[tuple[Any, tuple[Any, ...]]]


class _Recorder(TorchDispatchMode):
    """Keeps the calls of the library's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "ssmkernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def kernels_of(function: Function) -> Function:
    """A function that makes the same calls of the library's operators, forward and backward, and nothing else."""
    with _Recorder() as recorder:
        function()
    calls = [
        (func, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)) for func, args in recorder.calls
    ]

    @torch.no_grad()
    def kernels() -> None:
        for func, args in calls:
            func(*args)

    return kernels


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """Each op on 64 rows, forward alone and with backward."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(device, dtype)

    rows = F.normalize(normal(ROWS, DIM), dim=1).requires_grad_()
    bank, labels = F.normalize(normal(SLOTS, DIM), dim=1), torch.randint(0, CLASSES, (ROWS,), generator=draw).to(device)
    bank_labels = torch.randint(0, CLASSES, (SLOTS,), generator=draw).sort().values.to(device)
    probs = normal(ROWS, CLASSES).float().softmax(dim=1)
    network = [
        parameter.requires_grad_() for parameter in (normal(DIM, 2 * DIM) / 16, normal(DIM), normal(DIM), normal())
    ]
    logits = normal(ROWS, CLASSES).float().requires_grad_()
    points = knn_graph(torch.randn(ROWS, 16, generator=draw), 5).to(device)
    system = (points.crow, points.col, points.weight, None, torch.ones(ROWS, device=device))
    half_bank = (bank.clone(), bank_labels.clone(), torch.arange(ROWS, device=device), rows.detach().clone(), labels)

    yardstick = _step(lambda: F.cross_entropy(logits, labels), [logits])
    calls: dict[str, tuple[Callable[[], Any], Sequence[Tensor]]] = {
        "instance_matching": (
            lambda: ops.instance_matching(rows.detach(), rows, bank, bank_labels, probs).loss.sum(),
            [rows],
        ),
        "aggregate": (lambda: ops.aggregate(rows, bank, bank_labels, CLASSES).sum(), [rows]),
        "unfold": (lambda: ops.unfold(rows, bank, bank_labels, probs), []),
        "memory_update_": (lambda: ops.memory_update_(*half_bank), []),
        "laplacian_solve": (lambda: ops.laplacian_solve(*system, logits).solution.sum(), [logits]),
        "leave_one_edge_out": (
            lambda: ops.leave_one_edge_out(points.crow, points.col, points.reverse, points.weight, logits).sum(),
            [logits],
        ),
        "pair_logits": (lambda: ops.pair_logits(rows, rows, *network).sum(), [rows, *network]),
        "pair_focal_loss": (lambda: ops.pair_focal_loss(rows, rows, labels, labels, *network), [rows, *network]),
        "pair_ranking_loss": (lambda: ops.pair_ranking_loss(rows, labels), [rows]),
        "mined_pair_ranking_loss": (
            lambda: ops.mined_pair_ranking_loss(rows, rows.detach(), positive_threshold=0.1, negative_threshold=0.2),
            [rows],
        ),
        "similarity_moments": (lambda: sum(ops.similarity_moments(rows, labels)), [rows]),
    }
    for op, (forward, leaves) in list(calls.items())[:: 4 if quick else 1]:
        yield _case(op, "forward", forward, yardstick, dtype)
        if leaves:
            yield _case(op, "forward + backward", _step(forward, leaves), yardstick, dtype)


def _step(forward: Callable[[], Any], leaves: Sequence[Tensor]) -> Function:
    return lambda: torch.autograd.grad(forward(), leaves)


def _case(op: str, phase: str, ours: Function, yardstick: Function, dtype: torch.dtype) -> Case:
    return Case(
        op=op,
        phase=f"{phase}, small",
        size={"rows": ROWS},
        dtype=dtype,
        ours=ours,
        peers={"its kernels alone": kernels_of(ours), "F.cross_entropy + backward": yardstick},
        products={},
        product_counts={},
        flops=0,
        bytes=0,
    )
