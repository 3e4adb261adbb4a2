# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fuzz import values as v
from fuzz.contents import Tensors
from fuzz.oracle import Finding, Target, Undecided
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from ssmkernels import metrics

CLUSTERS = Number((1, 2, 3), least=1, integer=True, optional=True)
SEED = Number((0, 1, 7), least=0, most=2**32 - 1, integer=True)
APART = 1e-9  # squared distances of one query, beside the squares they are made of


def _draw_retrieval(draw: Draw) -> dict[str, Any]:
    rows, others, dim = draw(st.integers(2, 30)), draw(st.integers(1, 30)), draw(st.integers(1, 6))
    arguments = {
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": v.classes(draw, (rows,), draw(st.integers(1, 5)), v.dtype(draw, v.INTEGERS)),
        "recall_at": draw(st.sampled_from([(1, 2, 4, 8), 1, (3,), np.arange(1, 4), ()])),
        "precision_at": draw(st.sampled_from([(1, 2, 4, 8), 2, [5, 40]])),
    }
    if draw(st.booleans()):
        arguments["references"] = v.values(draw, (others, dim), v.dtype(draw))
        arguments["reference_labels"] = v.classes(draw, (others,), 5)
    return arguments


def _ranks(at: Any) -> list[int]:
    return sorted({int(k) for k in np.atleast_1d(at)})


def _squares(queries: Tensor, references: Tensor, within: bool) -> Tensor:
    """[N, M] squared distances from differences. Undecided where two are so close that rounding may exchange them."""
    squares = (queries[:, None] - references).square().sum(dim=2)
    sizes = queries.square().sum(dim=1).amax() + references.square().sum(dim=1).amax()
    same = (references[:, None] == references).all(dim=2)
    gaps = (squares[:, :, None] - squares[:, None]).abs()
    if bool(((gaps <= APART * sizes) & ~same).any()):
        raise Undecided
    return squares.fill_diagonal_(torch.inf) if within else squares


def _exact_retrieval(
    embeddings: Tensor,
    labels: Tensor,
    recall_at: Any,
    precision_at: Any,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
) -> dict[str, float]:
    """Query by query, as the definitions have it."""
    within = references is None
    queries, labels = torch.as_tensor(embeddings).double(), torch.as_tensor(labels)
    keys = queries if references is None else torch.as_tensor(references).double()
    key_labels = labels if reference_labels is None else torch.as_tensor(reference_labels)
    order = _squares(queries, keys, within).argsort(dim=1, stable=True)[:, : len(keys) - within]
    hits = key_labels[order] == labels[:, None]
    figures: dict[str, list[float]] = {name: [] for name in ("P@1", "RP", "MAP@R")}
    for row in hits.double():
        relevant = int(row.sum())
        for k in _ranks(recall_at):
            figures.setdefault(f"R@{k}", []).append(float(row[:k].any()))
        for k in _ranks(precision_at):
            if k > 1:
                figures.setdefault(f"P@{k}", []).append(float(row[:k].sum()) / k)
        if relevant:
            shares = row.cumsum(0) / torch.arange(1, len(row) + 1)
            figures["P@1"].append(float(row[0]))
            figures["RP"].append(float(row[:relevant].mean()))
            figures["MAP@R"].append(float((row * shares)[:relevant].sum()) / relevant)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in figures.items()}


def _draw_nmi(draw: Draw) -> dict[str, Any]:
    rows, dim = draw(st.integers(3, 12)), draw(st.integers(1, 4))
    return {
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": v.classes(draw, (rows,), 3, v.dtype(draw, v.INTEGERS)),
        "num_clusters": CLUSTERS.draw(draw),
        "seed": SEED.draw(draw),
    }


def _check_nmi(arguments: dict[str, Any], results: Tensors) -> None:
    if not 0 <= float(results["value"]) <= 1:
        raise Finding(f"{results['value']} is not in [0, 1]")


def _draw_clusters(draw: Draw) -> dict[str, Any]:
    (rows,) = v.sizes(draw, 1, least=1)
    return {
        name: v.classes(draw, (rows,), draw(st.integers(1, 5)), v.dtype(draw, v.INTEGERS))
        for name in ("labels", "clusters")
    }


def _exact_clusters(labels: Tensor, clusters: Tensor) -> Tensor:
    groups = (torch.as_tensor(ids).resolve_neg().numpy() for ids in (labels, clusters))
    return torch.tensor(normalized_mutual_info_score(*groups), dtype=torch.float64)


def _check_clusters(arguments: dict[str, Any], results: Tensors) -> None:
    """Sums of as many terms as there are groups, each of which is at most 1/e."""
    truth = float(_exact_clusters(**arguments))
    if not abs(float(results["value"]) - truth) <= 1e-6:
        raise Finding(f"{float(results['value'])}, exactly {truth}")


TARGETS = {
    "metrics.retrieval": Target(_draw_retrieval, metrics.retrieval, _exact_retrieval, flush=False),
    "metrics.nmi": Target(
        _draw_nmi,
        metrics.nmi,
        holds=_check_nmi,
        numbers={"num_clusters": CLUSTERS, "seed": SEED},
    ),
    "metrics.nmi_of_clusters": Target(_draw_clusters, metrics.nmi_of_clusters, holds=_check_clusters),
}
