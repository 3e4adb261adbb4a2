# SPDX-License-Identifier: BSD-3-Clause
"""The calling convention of pytorch-metric-learning's pair losses: loss(embeddings, labels, indices_tuple, ref_emb,
ref_labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmkernels.ops import _checks as check


class PairIndices(NamedTuple):
    """Positive pairs (positive_rows, positive_columns) and negative pairs likewise: rows of the embeddings, columns of
    the references.
    """

    positive_rows: Tensor
    positive_columns: Tensor
    negative_rows: Tensor
    negative_columns: Tensor


class PairLabels(NamedTuple):
    """All pairs, positive where labels [n] and reference_labels [m] are equal; without (i, i) where
    ``skip_diagonal``.
    """

    labels: Tensor
    reference_labels: Tensor
    skip_diagonal: bool


def _check_embeddings(name: str, value: Tensor, shape: str) -> None:
    check.check_tensor(name, value, shape, 2)
    check.check_floating(name, value)


def _integers(name: str, value: Tensor, like: Tensor) -> Tensor:
    check.check_tensor(name, value, "of one dimension", 1)
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    return value.to(like.device, torch.int64).resolve_neg()  # torch's indexing ignores the negative bit of an index


def _labels(name: str, value: Tensor, rows_name: str, rows: Tensor) -> Tensor:
    value = _integers(name, value, rows)
    check.check_size(name, value, 0, rows.shape[0], f"the rows of {rows_name}")
    return value


def _indices(indices_tuple: Sequence[Tensor], rows: int, columns: int, like: Tensor) -> PairIndices:
    if not isinstance(indices_tuple, Sequence) or len(indices_tuple) not in (3, 4):
        got = f"{len(indices_tuple)} elements" if isinstance(indices_tuple, Sequence) else type(indices_tuple).__name__
        must_be = "3 tensors (anchors, positives, negatives) or 4 (two lists of pairs)"
        raise ValueError(f"indices_tuple must be {must_be}, got {got}")
    listed = [_integers(f"indices_tuple[{place}]", positions, like) for place, positions in enumerate(indices_tuple)]
    anchors, positives, *negative = listed
    indices = PairIndices(anchors, positives, *(negative if len(negative) == 2 else (anchors, *negative)))
    for kind, first, second in (("positive", indices[0], indices[1]), ("negative", indices[2], indices[3])):
        if len(first) != len(second):
            lengths = f"{len(first)} and {len(second)}"
            raise ValueError(f"the {kind} pairs of indices_tuple must be two lists of one length, got {lengths}")
        if check.values_are_checked(first):
            check.check_range(f"the first of the {kind} pairs of indices_tuple", first, rows, "a row of embeddings")
            check.check_range(
                f"the second of the {kind} pairs of indices_tuple",
                second,
                columns,
                "a row of ref_emb, or of embeddings without",
            )
    return indices


def check_pair_arguments(
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Sequence[Tensor] | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, PairIndices | PairLabels]:
    """The embeddings, the references, which are the embeddings themselves without ``ref_emb``, and the pairs, on the
    same device.

    Rows labelled ``ignore_index`` are left out of all three.

    Raises:
        ValueError, TypeError: an argument is not as the losses say; the message names it.
    """
    _check_embeddings("embeddings", embeddings, "[n, d]")
    references = embeddings
    if ref_emb is None:
        if ref_labels is not None:
            raise ValueError("ref_labels was given without ref_emb")
        ref_labels = labels
    else:
        _check_embeddings("ref_emb", ref_emb, "[m, d]")
        if ref_labels is None and indices_tuple is None and ref_emb.shape[0] == embeddings.shape[0]:
            ref_labels = labels
        check.check_size("ref_emb", ref_emb, 1, embeddings.shape[1], "d of embeddings")
        check.check_same_device("ref_emb", ref_emb, "embeddings", embeddings)
        references = ref_emb
    own_labels = None if labels is None else _labels("labels", labels, "embeddings", embeddings)
    other_labels = None if ref_labels is None else _labels("ref_labels", ref_labels, "ref_emb", references)
    if indices_tuple is not None:
        indices = _indices(indices_tuple, embeddings.shape[0], references.shape[0], embeddings)
        return _without_ignored(embeddings, references, indices, own_labels, other_labels, ignore_index)
    if own_labels is None:
        raise ValueError("labels and indices_tuple are both None; one of them must say which pairs are positive")
    if other_labels is None:
        raise ValueError("ref_labels must be given with ref_emb, unless that has as many rows as embeddings")
    all_pairs = PairLabels(own_labels, other_labels, skip_diagonal=ref_labels is labels)
    return _without_ignored(embeddings, references, all_pairs, own_labels, other_labels, ignore_index)


def _without_ignored(
    embeddings: Tensor,
    references: Tensor,
    pairs: PairIndices | PairLabels,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, PairIndices | PairLabels]:
    if ignore_index is None:
        return embeddings, references, pairs
    kept = [
        torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device) if ids is None else ids != ignore_index
        for rows, ids in ((embeddings, labels), (references, ref_labels))
    ]
    x = embeddings[kept[0]]
    y = x if references is embeddings else references[kept[1]]
    if isinstance(pairs, PairLabels):
        return x, y, PairLabels(pairs.labels[kept[0]], pairs.reference_labels[kept[1]], pairs.skip_diagonal)
    places = [mask.cumsum(0) - 1 for mask in kept]  # of the rows that are left
    listed = []
    for rows, columns in (pairs[:2], pairs[2:]):
        both = kept[0][rows] & kept[1][columns]
        listed += [places[0][rows[both]], places[1][columns[both]]]
    return x, y, PairIndices(*listed)


def pair_masks(pairs: PairIndices | PairLabels, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs as masks [n, m]; a pair listed twice is one pair."""
    if isinstance(pairs, PairLabels):
        same = pairs.labels[:, None] == pairs.reference_labels
        negatives = ~same
        return (without_diagonal(same) if pairs.skip_diagonal else same), negatives
    positives = torch.zeros(rows, columns, dtype=torch.bool, device=pairs.positive_rows.device)
    negatives = torch.zeros_like(positives)
    positives[pairs.positive_rows, pairs.positive_columns] = True
    negatives[pairs.negative_rows, pairs.negative_columns] = True
    return positives, negatives


def without_diagonal(pairs: Tensor) -> Tensor:
    """The pairs (i, j), i ≠ j, of a mask [n, n]. Unlike ``fill_diagonal_``, whose meta kernel wants plain sizes, it
    compiles for any n.
    """
    rows = torch.arange(pairs.shape[0], device=pairs.device)
    return pairs & (rows[:, None] != rows)


def at_most_one_is_listed(pairs: PairIndices | PairLabels) -> bool:
    """Whether there are lists of pairs, and each holds one at most."""
    return isinstance(pairs, PairIndices) and all(len(rows) <= 1 for rows in pairs)


def zero_loss(embeddings: Tensor) -> Tensor:
    """0, with a gradient of 0."""
    return embeddings[:0].sum(dtype=check.compute_dtype(embeddings.dtype))
