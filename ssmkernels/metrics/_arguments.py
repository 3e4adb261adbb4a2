# SPDX-License-Identifier: BSD-3-Clause
"""What the metrics are given, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def embeddings_and_labels(
    name: str, embeddings: Tensor | np.ndarray, labels_name: str, labels: Tensor | np.ndarray, *, least: int = 1
) -> tuple[Tensor, Tensor]:
    """embeddings in float64, labels in int64, both checked."""
    embeddings = tensor(name, embeddings)
    if not embeddings.is_floating_point():
        raise TypeError(f"{name} should be floating point, got {embeddings.dtype}")
    if embeddings.ndim != 2:
        raise ValueError(f"{name} should be [N, d], got shape {list(embeddings.shape)}")
    if len(embeddings) < least:
        raise ValueError(f"{name} should have at least 1 row, got none")
    if embeddings.shape[1] == 0:
        raise ValueError(f"{name} should be [N, d] with d ≥ 1, got shape {list(embeddings.shape)}")
    if not bool(embeddings.isfinite().all()):
        raise ValueError(f"{name} should be finite, but holds NaN or infinity")
    labels = labels_of(labels_name, labels)
    if len(labels) != len(embeddings):
        raise ValueError(
            f"{labels_name} should have {len(embeddings)} entries, one for each row of {name}; got {len(labels)}"
        )
    if labels.device != embeddings.device:
        raise ValueError(f"{labels_name} should be on {embeddings.device}, the device of {name}; got {labels.device}")
    return embeddings.detach().double(), labels


def labels_of(name: str, labels: Tensor | np.ndarray) -> Tensor:
    labels = tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} should be integers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"{name} should be [N], got shape {list(labels.shape)}")
    return labels.long()


def tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor or an array, got {type(value).__name__}")
    return value.resolve_neg()  # numpy does not know the negative bit


def list_lengths(name: str, ranks: Any) -> list[int]:
    if isinstance(ranks, str) or not isinstance(ranks, Iterable) or getattr(ranks, "ndim", 1) == 0:
        ranks = [ranks]
    distinct = sorted({integer(name, k) for k in ranks})
    if distinct and distinct[0] < 1:
        raise ValueError(f"{name} should be integers ≥ 1, got {distinct[0]}")
    return distinct


def integer(name: str, value: Any) -> int:
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} should be an integer, got {value!r}")
    return number
