# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of the ranking family: our ops, pytorch-metric-learning's ContrastiveLoss, and plain PyTorch,
eager, compiled and in blocks of rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmkernels import ops, reference
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function

SIZES = [(64, 128), (64, 512), (256, 128), (1024, 128), (1024, 512), (4096, 64), (4096, 128), (4096, 512)]  # n, d
SIZES += [(16384, 128), (16384, 512)]
ALL_ACTIVE_SIZES = [(256, 128), (4096, 64), (4096, 128), (4096, 512)]
LARGE_SIZES = [(65536, 128)]  # without peers
REFERENCE_SIZES = [(256, 16384, 128), (64, 4096, 512)]  # n rows against m of a memory, d
QUICK_SIZES = [(64, 128), (256, 64)]
PER_CLASS = 16  # rows of a class
BASIS = 100  # vectors of the feature basis
BLOCK = 512  # rows whose pairs the blocked formulation has at a time
# Of which pytorch-metric-learning stores 9 GiB; plain PyTorch, which takes as long, is timed up to 4,096 rows
PEER_PAIRS = 16384**2
MARGIN, ALL_ACTIVE_MARGIN = 0.5, 1.8  # of unit vectors, nearly all of which are nearer than 1.8


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """Forward and backward: of the loss by labels with few active pairs and with nearly all, of the mined loss, and
    of the moments.
    """
    for rows, dim in QUICK_SIZES if quick else [*SIZES, *LARGE_SIZES]:
        yield loss_case(rows, dim, MARGIN, "forward + backward", device, dtype)
    for rows, dim in QUICK_SIZES[:1] if quick else ALL_ACTIVE_SIZES:
        yield loss_case(rows, dim, ALL_ACTIVE_MARGIN, "forward + backward, all active", device, dtype)
    for rows, references, dim in REFERENCE_SIZES[1:] if quick else REFERENCE_SIZES:
        yield references_case(rows, references, dim, device, dtype)
    for rows, dim in QUICK_SIZES if quick else [(64, 128), (1024, 128), (4096, 128), (4096, 512)]:
        yield mined_case(rows, dim, device, dtype)
    for rows, dim in QUICK_SIZES if quick else [(64, 128), (1024, 128), (4096, 128), (4096, 512)]:
        yield moments_case(rows, dim, device, dtype)


def _rows(count: int, dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows, with cosines of about ½ within a class, in no order."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randperm(count, generator=draw) % max(2, count // PER_CLASS)
    centers = F.normalize(torch.randn(int(labels.max()) + 1, dim, generator=draw))
    rows = F.normalize(centers[labels] + torch.randn(count, dim, generator=draw) / dim**0.5)
    return rows.to(device, dtype).requires_grad_(), labels.to(device)


def _pair_products(rows: Tensor) -> dict[str, Function]:
    rows = rows.detach()
    if rows.shape[0] ** 2 > PEER_PAIRS:
        return {}
    weights = rows @ rows.t()
    return {"distances": lambda: torch.mm(rows, rows.t()), "gradient": lambda: torch.mm(weights, rows)}


def in_blocks(rows: Tensor, labels: Tensor, *, negative_margin: float) -> Tensor:
    """The loss of blocks of rows against all, computed again in the backward pass: what losses over many pairs, such
    as SigLIP's, are written as where n × n values do not fit.
    """

    def block_sums(block: Tensor, of_block: Tensor, begin: int) -> Tensor:
        distances = torch.cdist(block, rows)
        same = of_block[:, None] == labels
        others = torch.ones_like(same)
        others.diagonal(begin).fill_(False)  # each row itself
        positive, negative = distances * (same & others), (negative_margin - distances).relu() * ~same
        return torch.stack([positive.sum(), negative.sum(), (positive > 0).sum(), (negative > 0).sum()])

    parts = []
    for begin in range(0, len(rows), BLOCK):
        block = slice(begin, begin + BLOCK)
        parts.append(checkpoint(block_sums, rows[block], labels[block], begin, use_reentrant=False))
    positive, negative, positives, negatives = torch.stack(parts).sum(dim=0)
    return positive / positives.clamp_min(1) + negative / negatives.clamp_min(1)


def loss_case(count: int, dim: int, margin: float, phase: str, device: str, dtype: torch.dtype) -> Case:
    rows, labels = _rows(count, dim, device, dtype)

    def step(loss: Callable[[], Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(), rows)

    def through(package: Any) -> Function:
        return step(lambda: package(rows, labels, negative_margin=margin))

    peers = {}
    products = _pair_products(rows)
    if count**2 <= PEER_PAIRS:
        try:
            from pytorch_metric_learning.distances import LpDistance
            from pytorch_metric_learning.losses import ContrastiveLoss
        except ImportError:
            pass
        else:
            theirs = ContrastiveLoss(0.0, margin, distance=LpDistance(normalize_embeddings=False))
            peers["pytorch-metric-learning"] = step(lambda: theirs(rows, labels))
    if BLOCK < count <= 4096:
        peers["in blocks"] = step(lambda: in_blocks(rows, labels, negative_margin=margin))
    if count <= 4096:
        peers["eager"] = through(reference.pair_ranking_loss)
        peers["torch.compile"] = through(torch.compile(reference.pair_ranking_loss, dynamic=False))
    return Case(
        op="pair_ranking_loss",
        phase=phase,
        size={"n": count, "d": dim},
        dtype=dtype,
        ours=through(ops.pair_ranking_loss),
        peers=peers,
        products=products,
        product_counts={"distances": 1, "gradient": 2} if products else {},
        flops=3 * 2 * count**2 * dim,
        bytes=4 * rows.element_size() * count * dim,
    )


def references_case(count: int, references: int, dim: int, device: str, dtype: torch.dtype) -> Case:
    """A batch against a memory of it and of earlier ones, as pytorch-metric-learning's CrossBatchMemory has it, which
    writes the batch there first.
    """
    rows, labels = _rows(count, dim, device, dtype)
    memory, memory_labels = _rows(references, dim, device, dtype)
    memory = torch.cat([rows, memory[count:]]).detach()
    memory_labels = torch.cat([labels, memory_labels[count:]])

    def step(loss: Callable[[], Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(), rows)

    def through(package: Any) -> Function:
        options = {"references": memory, "reference_labels": memory_labels, "negative_margin": MARGIN}
        return step(lambda: package(rows, labels, **options))

    peers = {}
    if importlib.util.find_spec("pytorch_metric_learning") is not None:
        peers["CrossBatchMemory"] = step(_cross_batch_memory(rows, labels, memory, memory_labels))
    peers["eager"] = through(reference.pair_ranking_loss)
    peers["torch.compile"] = through(torch.compile(reference.pair_ranking_loss, dynamic=False))
    weights = rows.detach() @ memory.t()
    return Case(
        op="pair_ranking_loss",
        phase="forward + backward, references",
        size={"n": count, "m": references, "d": dim},
        dtype=dtype,
        ours=through(ops.pair_ranking_loss),
        peers=peers,
        products={
            "distances": lambda: torch.mm(rows.detach(), memory.t()),
            "gradient": lambda: torch.mm(weights, memory),
        },
        product_counts={"distances": 1, "gradient": 1},
        flops=2 * 2 * count * references * dim,
        bytes=rows.element_size() * (3 * count + references) * dim,
    )


def _cross_batch_memory(rows: Tensor, labels: Tensor, memory: Tensor, memory_labels: Tensor) -> Callable[[], Tensor]:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory

    loss = ContrastiveLoss(0.0, MARGIN, distance=LpDistance(normalize_embeddings=False))
    queue = CrossBatchMemory(loss, rows.shape[1], memory_size=len(memory)).to(rows.device)
    queue.embedding_memory, queue.label_memory = memory.clone(), memory_labels.clone()
    queue.has_been_filled = True
    return lambda: queue(rows, labels)


def mined_case(count: int, dim: int, device: str, dtype: torch.dtype) -> Case:
    rows, _ = _rows(count, dim, device, dtype)
    basis = (
        rows.detach() @ torch.randn(dim, BASIS, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ).requires_grad_(False)
    thresholds = {"positive_threshold": 0.4, "negative_threshold": 0.0}

    def step(loss: Callable[..., Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(rows, basis, **thresholds, negative_margin=1.0), rows)

    products = _pair_products(rows)
    return Case(
        op="mined_pair_ranking_loss",
        phase="forward + backward",
        size={"n": count, "d": dim, "k": BASIS},
        dtype=dtype,
        ours=step(ops.mined_pair_ranking_loss),
        peers={
            "eager": step(reference.mined_pair_ranking_loss),
            "torch.compile": step(torch.compile(reference.mined_pair_ranking_loss, dynamic=False)),
        },
        products=products | {"cosines": lambda: torch.mm(basis, basis.t())},
        product_counts={"distances": 1, "gradient": 2, "cosines": 1},
        flops=2 * count**2 * (3 * dim + BASIS),
        bytes=4 * rows.element_size() * count * (dim + BASIS),
    )


def moments_case(count: int, dim: int, device: str, dtype: torch.dtype) -> Case:
    rows, labels = _rows(count, dim, device, dtype)

    def step(package: Any) -> Function:
        return lambda: torch.autograd.grad(sum(package(rows, labels)), rows)

    detached = rows.detach()
    if count <= dim:  # from the cosines of pairs; with more rows from RᵀR and its product with them
        products, counts = _pair_products(rows), {"distances": 1, "gradient": 2}
    else:
        gram = detached.t() @ detached
        products = {"RᵀR": lambda: torch.mm(detached.t(), detached), "R·RᵀR": lambda: torch.mm(detached, gram)}
        counts = {"RᵀR": 1, "R·RᵀR": 1}
    return Case(
        op="similarity_moments",
        phase="forward + backward",
        size={"n": count, "d": dim},
        dtype=dtype,
        ours=step(ops.similarity_moments),
        peers={
            "eager": step(reference.similarity_moments),
            "torch.compile": step(torch.compile(reference.similarity_moments, dynamic=False)),
        },
        products=products,
        product_counts=counts,
        flops=(6 if count <= dim else 4) * count * dim * min(count, dim),
        bytes=4 * rows.element_size() * count * dim,
    )
