# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of the memory family: our op, the reference in eager mode and under torch.compile, and the
formulation users have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import ops, reference
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function

DIM = 128
SIZES = [
    (64, 250, 10),
    (448, 250, 10),
    (64, 4_000, 10),
    (448, 4_000, 10),
    (448, 10_000, 100),
    (320, 12_800, 1000),
    (320, 128_000, 1000),
]
QUICK_SIZES = [(64, 250, 10), (448, 4_000, 10), (320, 12_800, 1000)]
CUDA_SIZES = [*QUICK_SIZES, (320, 128_000, 1000)]  # torch.compile takes its seconds for each


def official_block(
    query_weak: Tensor, query_strong: Tensor, bank: Tensor, bank_labels: Tensor, probs_weak: Tensor
) -> tuple[Tensor, Tensor]:
    """SimMatch's loss the way its training code states it: softmax, gather, renormalise, scatter_add, log; bank [D,
    K].
    """
    with torch.no_grad():
        weak = F.softmax(query_weak @ bank / 0.1, dim=1)
        index = bank_labels.expand(query_weak.shape[0], -1)
        target = weak * probs_weak.gather(1, index)
        target = target / target.sum(dim=1, keepdim=True)
        aggregated = torch.zeros_like(probs_weak).scatter_add(1, index, weak)
        pseudo_probs = 0.9 * probs_weak + 0.1 * aggregated
    strong = F.softmax(query_strong @ bank / 0.1, dim=1)
    return pseudo_probs, -(target * strong.log()).sum(dim=1)


def attention(query: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int) -> Tensor:
    """`aggregate` as torch's attention, with the classes of the slots, one-hot, as values."""
    values = F.one_hot(bank_labels, num_classes).to(query.dtype)
    return F.scaled_dot_product_attention(query[None, None], bank[None, None], values[None, None], scale=10.0)[0, 0]


Op = Callable[..., Any]  # an op, or what stands in its place


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """One case per op and size; unit-norm random features, a class-sorted bank, as nn.LabeledMemory keeps it."""
    for rows, slots, classes in QUICK_SIZES if quick else CUDA_SIZES if device == "cuda" else SIZES:
        yield from cases_of_size(rows, slots, classes, device, dtype)


def cases_of_size(rows: int, slots: int, classes: int, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The four ops on one size."""
    draw = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, DIM, generator=draw), dim=1).to(device, dtype)

    query_weak, query_strong, bank = unit(rows), unit(rows).requires_grad_(), unit(slots)
    labels = torch.randint(0, classes, (slots,), generator=draw).sort().values.to(device)
    probs = torch.randn(rows, classes, generator=draw).softmax(dim=1).to(device)
    grad_classes = torch.randn(rows, classes, generator=draw).to(device)
    official_bank = bank.t().contiguous()
    size = {"B": rows, "D": DIM, "K": slots, "L": classes}
    products: dict[str, Function] = {
        "score": functools.partial(torch.mm, query_weak, bank.t()),
        "mean": _mean_product(rows, bank),
    }
    item = bank.element_size()

    def matching(op: Op, inputs: Any = (query_weak, query_strong, bank, labels, probs)) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*inputs)[1].mean(), inputs[1])

    yield Case(
        op="instance_matching",
        phase="forward + backward",
        size=size,
        dtype=dtype,
        ours=matching(ops.instance_matching),
        peers={
            "eager": matching(reference.instance_matching),
            "torch.compile": matching(torch.compile(reference.instance_matching, dynamic=False)),
            "official": matching(official_block, (query_weak, query_strong, official_bank, labels, probs.to(dtype))),
        },
        products=products,
        product_counts={"score": 2, "mean": 2},
        flops=8 * rows * slots * DIM,
        bytes=item * (slots + 3 * rows) * DIM + 8 * slots + 8 * rows * classes,
    )

    def aggregate(
        op: Op, inputs: Any = (query_strong, bank, labels, classes), grad: Tensor = grad_classes
    ) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*inputs), inputs[0], grad)

    yield Case(
        op="aggregate",
        phase="forward + backward",
        size=size,
        dtype=dtype,
        ours=aggregate(ops.aggregate),
        peers={
            "eager": aggregate(reference.aggregate),
            "torch.compile": aggregate(torch.compile(reference.aggregate, dynamic=False)),
            "attention": aggregate(attention, grad=grad_classes.to(dtype)),
        },
        products=products,
        product_counts={"score": 2, "mean": 1},
        flops=6 * rows * slots * DIM,
        bytes=item * (2 * slots + 3 * rows) * DIM + 16 * slots + 16 * rows * classes,
    )

    def unfold(op: Op, inputs: Any = (query_weak, bank, labels, probs)) -> Callable[[], object]:
        return lambda: op(*inputs)

    yield Case(
        op="unfold",
        phase="forward",
        size=size,
        dtype=dtype,
        ours=unfold(ops.unfold),
        peers={
            "eager": unfold(reference.unfold),
            "torch.compile": unfold(torch.compile(reference.unfold, dynamic=False)),
        },
        products={"score": products["score"]},
        product_counts={"score": 1},
        flops=2 * rows * slots * DIM,
        bytes=item * (slots + rows) * DIM + 8 * slots + 4 * rows * classes + 4 * rows * slots,
    )

    features, index = unit(rows), torch.randperm(slots, generator=draw)[:rows].to(device)
    index = index.repeat(-(-rows // slots))[:rows]

    writable = (bank.clone(), labels.clone(), index, features, labels[index])

    def update(op: Op, inputs: Any = writable) -> Callable[[], object]:
        return lambda: op(*inputs)

    yield Case(
        op="memory_update_",
        phase="in place",
        size=size,
        dtype=dtype,
        ours=update(ops.memory_update_),
        peers={"eager": update(vectorised_update)},
        products={},
        product_counts={},
        flops=0,
        bytes=3 * item * rows * DIM,
    )


def _mean_product(rows: int, bank: Tensor) -> Callable[[], object]:
    """[B, K]·[K, D]; the weights are drawn at the first call, not kept for sizes that are not measured."""
    weights: list[Tensor] = []

    def product() -> Tensor:
        if not weights:
            weights.append(torch.rand(rows, bank.shape[0], device=bank.device, dtype=bank.dtype))
        return weights[0] @ bank

    return product


def vectorised_update(bank: Tensor, bank_labels: Tensor, index: Tensor, features: Tensor, labels: Tensor) -> None:
    """What training code has in this place: index, mix, normalise, write; duplicates are not applied in order."""
    bank[index] = F.normalize(0.7 * bank[index] + 0.3 * features, dim=1)
    bank_labels[index] = labels
