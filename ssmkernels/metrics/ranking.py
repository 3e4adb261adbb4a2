# SPDX-License-Identifier: BSD-3-Clause
"""How well embeddings retrieve: the recall and precision of Zhuang and Moulin (CVPR 2023), equations (34)-(35);
R-precision and MAP@R of Musgrave et al. (ECCV 2020), as pytorch-metric-learning's AccuracyCalculator has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ssmkernels.distributed import (
    Group,
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    gather_sizes,
    is_split,
    rank_of,
)
from ssmkernels.metrics._arguments import embeddings_and_labels, list_lengths, tensor
from ssmkernels.metrics.search import LocalSearch, RingSearch, Search


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

    With a group, N and M are of this rank: on the CPU references go round the ranks in blocks, of which a rank has two
    besides its own, and all of them for every share of its queries; on other devices each rank has those of all.

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
        group: the ranks whose rows are the embeddings and the references: a process group, or None for the default
            group. Each rank gives some of either, also none, and its queries are looked for among the references of
            all; every rank gets the figures of all queries.

    Raises:
        TypeError: a dtype is wrong, or a k is not an integer.
        ValueError: a shape, device or value is wrong; the message names it.
    """
    split = is_split(group)
    least = 0 if split else 1
    queries, labels = embeddings_and_labels("embeddings", embeddings, "labels", labels, least=least)
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels should be given together")
    keys, key_labels, given = queries, labels, embeddings
    if references is not None and reference_labels is not None:
        keys, key_labels = embeddings_and_labels(
            "references", references, "reference_labels", reference_labels, least=least
        )
        given = references
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
    sizes = gather_sizes([len(keys)], keys.device, group=group)
    starts = list(accumulate((count for (count,) in sizes), initial=0))
    within = references is None or ref_includes_query
    if starts[-1] < 1 + within:
        wanted = "embeddings should have at least 2 rows, or references should be given"
        if references is not None:
            wanted = f"references should have at least {1 + within} rows" + (
                " where they include the query" if within else ""
            )
        raise ValueError(f"{wanted}; got {starts[-1]}")
    recall_at, precision_at = list_lengths("recall_at", recall_at), list_lengths("precision_at", precision_at)

    class_sizes, largest = _class_sizes(labels, key_labels, group)
    relevant = class_sizes - int(within)  # R of each query
    if split and keys.device.type == "cpu":
        search: Search = RingSearch(tensor("references", given).detach(), key_labels, starts, group)
    else:
        search = LocalSearch(all_gather_rows(keys, group=group), all_gather_rows(key_labels, group=group))
    # Queries of classes of similar size go together, so that one large class does not lengthen every list.
    at_once = search.rows_at_once(max(1, *recall_at, *precision_at, largest))
    shares = list(relevant.argsort(stable=True).split(at_once))
    if split:
        most = all_reduce_max(torch.tensor(len(shares), device=queries.device), group=group)
        shares += [shares[0][:0]] * (int(most) - len(shares))

    figures = {f"R@{k}": queries.new_empty(len(queries)) for k in recall_at}
    figures |= {f"P@{k}": queries.new_empty(len(queries)) for k in precision_at}
    figures |= {name: queries.new_empty(len(queries)) for name in ("P@1", "RP", "MAP@R")}
    before = starts[rank_of(group)]
    for rows in shares:
        count = relevant[rows]
        longest = max(1, *recall_at, *precision_at, *count[-1:].tolist())
        itself = before + rows if within else None
        same = search.same(queries[rows], labels[rows], min(longest, starts[-1] - within), itself)
        if len(rows) == 0:
            continue
        hits = same.cumsum(dim=1, dtype=torch.float64)
        for k in recall_at:
            figures[f"R@{k}"][rows] = (hits[:, :k][:, -1] > 0).double()
        for k in {1, *precision_at}:
            figures[f"P@{k}"][rows] = hits[:, :k][:, -1] / k
        rank = torch.arange(1, same.shape[1] + 1, device=count.device)
        figures["RP"][rows] = hits.gather(1, (count[:, None] - 1).clamp_min(0))[:, 0] / count
        figures["MAP@R"][rows] = (hits / rank * (same & (rank <= count[:, None]))).sum(dim=1) / count

    answered = relevant > 0
    selected = {
        name: values[answered] if name in ("P@1", "RP", "MAP@R") else values for name, values in figures.items()
    }
    names = ["P@1", *(f"R@{k}" for k in recall_at), *(f"P@{k}" for k in precision_at), "RP", "MAP@R"]
    sums = torch.stack([selected[name].sum() for name in names])
    counts = torch.tensor([len(selected[name]) for name in names]).to(sums)
    sums, counts = all_reduce_sum(torch.stack([sums, counts]), group=group)
    return dict(zip(names, (sums / counts).tolist(), strict=True))


def _class_sizes(labels: Tensor, key_labels: Tensor, group: Group) -> tuple[Tensor, int]:
    """How many references of all ranks are of the class of each of ``labels`` [N], and of the largest class."""
    classes, counts = key_labels.unique(return_counts=True)
    of_ranks = all_gather_rows(torch.stack([classes, counts], dim=1), group=group)
    classes, place = of_ranks[:, 0].unique(return_inverse=True)
    sizes = torch.zeros_like(classes).index_add_(0, place, of_ranks[:, 1])
    nearest = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    return torch.where(classes[nearest] == labels, sizes[nearest], 0), int(sizes.max())
