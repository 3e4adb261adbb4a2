# SPDX-License-Identifier: BSD-3-Clause
"""How well embeddings retrieve and cluster: recall, precision, R-precision, MAP@R and normalised mutual information.

The recall, precision and NMI of Zhuang and Moulin (CVPR 2023), equations (30)-(35); R-precision and MAP@R of Musgrave
et al. (ECCV 2020), as pytorch-metric-learning's AccuracyCalculator has them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import Group, all_gather_rows, all_reduce_sum, gather_sizes, is_split, rank_of
from ssmkernels.ops import _neighbours as kernels

__all__ = ["nmi", "nmi_of_clusters", "retrieval"]

# Distances or candidates in memory at a time; 64 MiB of float64.
_CHUNK_ENTRIES = 2**23


@torch.no_grad()
def retrieval(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    references: Tensor | np.ndarray | None = None,
    reference_labels: Tensor | np.ndarray | None = None,
    ref_includes_query: bool = False,
    recall_at: int | Iterable[int] = (1, 2, 4, 8),
    precision_at: int | Iterable[int] = (1, 2, 4, 8),
    group: Group = "local",
) -> dict[str, float]:
    """Ranks the references of every query by distance, and tells how many of its own class come first.

    =========  ==========================================================================  =================
    key        mean over the queries of                                                    queries
    =========  ==========================================================================  =================
    ``P@1``    whether the nearest reference is of the query's class                       with R ≥ 1
    ``R@k``    whether one of the k nearest is, equation (34)                              all
    ``P@k``    the share of the k nearest that are, equation (35)                          all
    ``RP``     the share of the R nearest that are                                         with R ≥ 1
    ``MAP@R``  (1/R) Σ_{j ≤ R} [the j-th is] · (share of the j nearest that are)           with R ≥ 1
    =========  ==========================================================================  =================

    R is the number of references of the query's class, itself not counted. ``P@1`` is always there and always leaves
    out the queries without any such reference, as pytorch-metric-learning does; over all queries it is ``R@1``. Where
    no query has one, the three are NaN. Where there are fewer than k references, the missing ones count as misses.

    Distances are Euclidean between the embeddings as given (for unit vectors, the order of the cosine), in float64,
    exact, over all references; equal distances rank by index, and equal references have equal distances. Queries are
    taken some at a time: the memory is O((N + M)·d) and a bounded share of the lists of the nearest, or on other
    devices than the CPU of the N·M distances. Runs on the device of ``embeddings``.

    Every label is a class here, −1 too: leave out what is unlabelled.

    Args:
        embeddings: [N, d] queries, floating point, finite, d ≥ 1.
        labels: [N] integers.
        references: [M, d] in which to search; by default the queries, each without itself.
        reference_labels: [M] integers, with ``references`` only.
        ref_includes_query: the first N references are the queries, and each query is left out of its own ranking. As
            pytorch-metric-learning's ``get_accuracy`` has it.
        recall_at: the k of ``R@k``, each ≥ 1; one k or several.
        precision_at: the k of ``P@k``, likewise.
        group: the ranks whose rows are the embeddings: a process group, or None for the default group. Each rank gives
            some, also none, and ranks the references of those, which are the rows of all; every rank gets the figures
            of all queries. Not with ``references``.

    Raises:
        TypeError: a dtype is wrong, or a k is not an integer.
        ValueError: a shape, device or value is wrong; the message names it.
    """
    split = is_split(group)
    queries, labels = _embeddings_and_labels("embeddings", embeddings, "labels", labels, least=0 if split else 1)
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels should be given together")
    if split and references is not None:
        raise ValueError("references should be None with a group: they are the rows of all ranks")
    before = 0  # rows of the ranks before this one
    if references is None or reference_labels is None:
        keys, key_labels = queries, labels
        if split:
            rows_of_ranks = gather_sizes([len(queries)], queries.device, group=group)
            before = sum(count for (count,) in rows_of_ranks[: rank_of(group)])
            keys, key_labels = all_gather_rows(queries, group=group), all_gather_rows(labels, group=group)
        if len(keys) < 2:
            raise ValueError(f"embeddings should have at least 2 rows, or references should be given; got {len(keys)}")
    else:
        keys, key_labels = _embeddings_and_labels("references", references, "reference_labels", reference_labels)
        if keys.shape[1] != queries.shape[1]:
            raise ValueError(
                f"references should be of dimension {queries.shape[1]}, that of embeddings; got {keys.shape[1]}"
            )
        if keys.device != queries.device:
            raise ValueError(f"references should be on {queries.device}, the device of embeddings; got {keys.device}")
        if ref_includes_query and not (
            keys[: len(queries)].equal(queries) and key_labels[: len(queries)].equal(labels)
        ):
            raise ValueError(
                f"references and reference_labels should begin with the {len(queries)} rows of embeddings and labels, "
                "as ref_includes_query says"
            )
        if ref_includes_query and len(keys) < 2:
            raise ValueError(f"references should have at least 2 rows where they include the query; got {len(keys)}")
    within = references is None or ref_includes_query
    recall_at, precision_at = _ranks("recall_at", recall_at), _ranks("precision_at", precision_at)

    classes, codes = torch.unique(torch.cat([labels, key_labels]), return_inverse=True)
    labels, key_labels = codes[: len(labels)], codes[len(labels) :]
    class_sizes = torch.bincount(key_labels, minlength=len(classes))
    relevant = class_sizes[labels] - int(within)  # R of each query
    longest_list = max(1, *recall_at, *precision_at, int(class_sizes.max()))
    search = _FusedSearch(keys) if keys.device.type == "cpu" else _Distances(keys)

    figures = {f"R@{k}": queries.new_empty(len(queries)) for k in recall_at}
    figures |= {f"P@{k}": queries.new_empty(len(queries)) for k in precision_at}
    figures |= {name: queries.new_empty(len(queries)) for name in ("P@1", "RP", "MAP@R")}
    # Queries of classes of similar size go together, so that one large class does not lengthen every list.
    for rows in relevant.argsort(stable=True).split(search.rows_at_once(longest_list)) if len(queries) else ():
        longest = max(1, *recall_at, *precision_at, int(relevant[rows].max()))
        nearest = search.nearest(queries[rows], min(longest, len(keys) - within), before + rows if within else None)
        same = (key_labels[nearest] == labels[rows, None]) & (nearest >= 0)  # −1: a distance that overflows
        hits = same.cumsum(dim=1, dtype=torch.float64)
        for k in recall_at:
            figures[f"R@{k}"][rows] = (hits[:, :k][:, -1] > 0).double()
        for k in {1, *precision_at}:
            figures[f"P@{k}"][rows] = hits[:, :k][:, -1] / k
        count = relevant[rows]
        rank = torch.arange(1, nearest.shape[1] + 1, device=count.device)
        figures["RP"][rows] = hits.gather(1, (count[:, None] - 1).clamp_min(0))[:, 0] / count
        figures["MAP@R"][rows] = (hits / rank * (same & (rank <= count[:, None]))).sum(dim=1) / count

    answered = relevant > 0
    selected = {
        name: values[answered] if name in ("P@1", "RP", "MAP@R") else values for name, values in figures.items()
    }
    names = ["P@1", *(f"R@{k}" for k in recall_at), *(f"P@{k}" for k in precision_at), "RP", "MAP@R"]
    sums = torch.stack([selected[name].sum() for name in names])
    counts = torch.tensor([len(selected[name]) for name in names]).to(sums)
    if split:
        sums, counts = all_reduce_sum(torch.stack([sums, counts]), group=group)
    return dict(zip(names, (sums / counts).tolist(), strict=True))


class _FusedSearch:
    """Searches ``references`` [M, d] on the CPU by the kernel of ``knn_graph``: the largest q·r − ‖r‖²/2."""

    def __init__(self, references: Tensor) -> None:
        self._references = references
        self._offsets = references.square().sum(dim=1).div_(-2)

    def rows_at_once(self, longest: int) -> int:
        return max(1, _CHUNK_ENTRIES // (4 * (longest + 8)))  # candidates, twice as many as are kept, of two numbers

    def nearest(self, queries: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """[B, k] references nearest to each of ``queries`` [B, d], without reference ``itself`` [B]."""
        if itself is None:
            return kernels.nearest(queries, k, columns=self._references, offsets=self._offsets)[0].long()
        ids = kernels.nearest(queries, k + 1, columns=self._references, offsets=self._offsets)[0].long()
        itself_last = (ids == itself[:, None]).int().argsort(dim=1, stable=True)
        return ids.gather(1, itself_last[:, :k])


class _Distances:
    """Searches ``references`` [M, d] by squared Euclidean distances, but for the squared norm of the query, which
    changes no order.
    """

    def __init__(self, references: Tensor) -> None:
        # A matrix product may round the same numbers differently from column to column; equal references are computed
        # once instead.
        distinct, self._position = torch.unique(references, dim=0, return_inverse=True)
        self._repeated = len(distinct) < len(references)
        rows = distinct if self._repeated else references
        self._rows = torch.cat([-2 * rows, rows.square().sum(dim=1, keepdim=True)], dim=1)  # [M, d + 1]

    def rows_at_once(self, longest: int) -> int:
        return max(1, _CHUNK_ENTRIES // len(self._position))

    def nearest(self, queries: Tensor, k: int, itself: Tensor | None) -> Tensor:
        """As :meth:`_FusedSearch.nearest`: ‖r‖² − 2 q·r is the one product of (q, 1) and (−2 r, ‖r‖²)."""
        distances = torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1) @ self._rows.t()
        if self._repeated:
            distances = distances[:, self._position]
        if itself is not None:
            distances.scatter_(1, itself[:, None], torch.inf)
        return smallest(distances, k)


def smallest(values: Tensor, k: int) -> Tensor:
    """[B, k] columns of the k least of each row of ``values`` [B, M], ascending, and by index where they are equal."""
    largest = values.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    kept = values <= largest
    candidates = kept.nonzero()
    if len(candidates) > k * len(values):  # more columns as far as the k-th: the first of them by index
        below, tied = values < largest, values == largest
        remaining = k - below.sum(dim=1, keepdim=True)
        candidates = (below | (tied & (tied.cumsum(dim=1) <= remaining))).nonzero()
    columns = candidates[:, 1].view(-1, k)
    order = values.gather(1, columns).sort(dim=1, stable=True).indices
    return columns.gather(1, order)


def nmi(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    group: Group = "local",
) -> float:
    """Normalised mutual information 2 I/(H + H) between the classes and a k-means clustering of the embeddings:
    equations (30)-(33).

    Clusters with scikit-learn's k-means, on the CPU: k-means++ seeding, one run. The same seed gives the same clusters;
    another may give others. :func:`nmi_of_clusters` rates clusters from elsewhere.

    Args:
        embeddings: [N, d], floating point, finite.
        labels: [N] integers.
        num_clusters: from 1 to N; by default the number of classes.
        seed: of k-means, from 0 to 2³² − 1.
        group: the ranks whose rows are the embeddings, as in :func:`retrieval`; each clusters them all.

    Returns:
        A number in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: an argument is not as said above; the message names it.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError("this needs scikit-learn: pip install scikit-learn, or 'ssmkernels[train]'") from None
    split = is_split(group)
    points, labels = _embeddings_and_labels("embeddings", embeddings, "labels", labels, least=0 if split else 1)
    if split:
        points, labels = all_gather_rows(points, group=group), all_gather_rows(labels, group=group)
    if num_clusters is None:
        num_clusters = len(labels.unique())
    num_clusters, seed = _integer("num_clusters", num_clusters), _integer("seed", seed)
    if not 1 <= num_clusters <= len(points):
        raise ValueError(
            f"num_clusters should be from 1 to {len(points)}, the number of embeddings; got {num_clusters}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed should be from 0 to 2³² − 1, got {seed}")
    clusters = KMeans(num_clusters, n_init=1, random_state=seed).fit_predict(points.cpu().numpy())
    return nmi_of_clusters(labels.cpu(), clusters)


def nmi_of_clusters(labels: Tensor | np.ndarray, clusters: Tensor | np.ndarray) -> float:
    """Normalised mutual information 2 I/(H + H) between classes and clusters, each [N] integers: equations (30)-(33).

    1 where the two agree but for the names, also where both are a single group; 0 where they tell nothing of each
    other.

    Raises:
        TypeError, ValueError: an argument is not as said above, or N is 0; the message names it.
    """
    classes, groups = _labels("labels", labels), _labels("clusters", clusters)
    if len(groups) != len(classes):
        raise ValueError(f"clusters should have {len(classes)} entries, as many as labels; got {len(groups)}")
    if groups.device != classes.device:
        raise ValueError(f"clusters should be on {classes.device}, the device of labels; got {groups.device}")
    if len(classes) == 0:
        raise ValueError("labels should have at least 1 entry, got none")
    _, classes = classes.unique(return_inverse=True)
    names, groups = groups.unique(return_inverse=True)
    entropies = _entropy(classes) + _entropy(groups)
    if entropies == 0:
        return 1.0
    # I = H(Ω) + H(C) − H(Ω, C)
    information = entropies - _entropy(classes * len(names) + groups)
    return min(max(2 * information / entropies, 0.0), 1.0)


def _entropy(groups: Tensor) -> float:
    """In nats: equations (32), (33)."""
    share = groups.unique(return_counts=True)[1].double() / len(groups)
    return float(-(share * share.log()).sum()) + 0.0  # no -0.0


def _embeddings_and_labels(
    name: str, embeddings: Tensor | np.ndarray, labels_name: str, labels: Tensor | np.ndarray, *, least: int = 1
) -> tuple[Tensor, Tensor]:
    """embeddings in float64, labels in int64, both checked."""
    embeddings = _tensor(name, embeddings)
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
    labels = _labels(labels_name, labels)
    if len(labels) != len(embeddings):
        raise ValueError(
            f"{labels_name} should have {len(embeddings)} entries, one for each row of {name}; got {len(labels)}"
        )
    if labels.device != embeddings.device:
        raise ValueError(f"{labels_name} should be on {embeddings.device}, the device of {name}; got {labels.device}")
    return embeddings.detach().double(), labels


def _labels(name: str, labels: Tensor | np.ndarray) -> Tensor:
    labels = _tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} should be integers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"{name} should be [N], got shape {list(labels.shape)}")
    return labels.long()


def _tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a tensor or an array, got {type(value).__name__}")
    return value.resolve_neg()  # numpy does not know the negative bit


def _ranks(name: str, ranks: Any) -> list[int]:
    if isinstance(ranks, str) or not isinstance(ranks, Iterable) or getattr(ranks, "ndim", 1) == 0:
        ranks = [ranks]
    distinct = sorted({_integer(name, k) for k in ranks})
    if distinct and distinct[0] < 1:
        raise ValueError(f"{name} should be integers ≥ 1, got {distinct[0]}")
    return distinct


def _integer(name: str, value: Any) -> int:
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} should be an integer, got {value!r}")
    return number
