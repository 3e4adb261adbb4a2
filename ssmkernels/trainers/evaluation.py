# SPDX-License-Identifier: BSD-3-Clause
"""What trainers measure: accuracy of a classifier, retrieval with embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmkernels import metrics
from ssmkernels.distributed import all_gather_rows, all_reduce_sum, is_distributed


@torch.no_grad()
def top_k_accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, ks: tuple[int, ...] = (1,)
) -> list[float]:
    """The share of images whose class is among the k with the highest logits, for each k, over the batches of all
    ranks.

    Args:
        model: images [N, C, H, W] -> (logits [N, L], anything); it is put in eval mode for the time.
        batches: (images, labels [N]) of this rank.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(len(ks) + 1, device=device, dtype=torch.float64)
    for images, labels in batches:
        logits, _ = model(images.to(device))
        hits = logits.topk(max(ks), dim=1).indices == labels.to(device)[:, None]
        counts += torch.stack([*(hits[:, :k].sum() for k in ks), torch.tensor(len(labels), device=device)])
    model.train(training)
    *correct, total = all_reduce_sum(counts).tolist()
    return [count / max(total, 1) for count in correct]


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Features v [N, d], embeddings z [N, δ] and labels [N] of all images of a data set in its order, on every rank.

    Args:
        model: images [N, C, H, W] -> (v, z); it is put in eval mode for the time.
        batches: (images, labels [n]) of this rank, as :func:`ssmkernels.data.evaluation_batches` deals them out: every
            R-th image.
    """
    training = model.training
    model.eval()
    parts = [(*model(images.to(device)), labels.to(device)) for images, labels in batches]
    model.train(training)
    features, embeddings, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    ranks = dist.get_world_size() if is_distributed() else 1
    count = int(all_reduce_sum(torch.tensor(len(labels), device=device)))
    order = torch.cat([torch.arange(rank, count, ranks, device=device) for rank in range(ranks)]).argsort()
    return all_gather_rows(features)[order], all_gather_rows(embeddings)[order], all_gather_rows(labels)[order]


def retrieval(embeddings: Tensor, labels: Tensor, queries: np.ndarray | None = None, **at: Any) -> dict[str, float]:
    """:func:`ssmkernels.metrics.retrieval` of each image among all others; or, where some are ``queries`` [N] bool
    (:class:`ssmkernels.data.ImageCollection`), of those among the rest.
    """
    if queries is None or not queries.any():
        return metrics.retrieval(embeddings, labels, **at)
    asked = torch.from_numpy(queries).to(embeddings.device)
    return metrics.retrieval(
        embeddings[asked], labels[asked], references=embeddings[~asked], reference_labels=labels[~asked], **at
    )


def retrieval_figures(embeddings: Tensor, labels: Tensor, queries: np.ndarray | None = None) -> dict[str, float]:
    """R@k and P@k for k = 1, 2, 4, 8, RP, MAP@R and NMI, equations (30)-(35) of mixed label propagation, by the
    names of the metrics.
    """
    return {**retrieval(embeddings, labels, queries), "NMI": metrics.nmi(embeddings, labels)}
