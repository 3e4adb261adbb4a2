# SPDX-License-Identifier: BSD-3-Clause
"""What the paper compares mixed label propagation with (its sections 4.4 and 4.5), and two checks of its mechanism.

The functions that give a W_dis [E] are for ``mixed_label_propagation(..., dissimilarity=...)``. As there, what goes
with a W_dis takes W/w̄ for W, w̄ being the mean of the positive weights: β and μ are in units of w̄.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkernels import ops
from ssmkernels.graph.deviation import sum_by
from ssmkernels.graph.propagation import (
    LabelSystem,
    MixedLabelPropagation,
    check_dissimilarity,
    check_graph,
    confidence_of,
    node_labels,
)
from ssmkernels.graph.structure import Graph
from ssmkernels.ops import _checks as check

EDGES_AT_ONCE = 2**18
DENSE_NODES = 4096


class LPDR(NamedTuple):
    """What :func:`lpdr` returns."""

    scores: Tensor
    """[N, C]; where the system is indefinite, a stationary point and no minimum."""
    pseudo_labels: Tensor
    """[N] int64, −1 in components of the graph without labels."""
    indefinite: bool
    """Whether the system is not positive definite, so that (23) with (25) has no minimum."""
    curvature: float
    """The least p·A p/p·p that conjugate gradients met."""


def learning_with_local_and_global_consistency(
    graph: Graph,
    labels: Tensor | np.ndarray,
    *,
    num_classes: int | None = None,
    alpha: float = 0.99,
    rtol: float = 1e-6,
    max_iter: int = 1000,
) -> Tensor:
    """F [N, C] of (I − α S) F = Y with S = D^−½ W D^−½ (Zhou et al., NIPS 2003), the "original LP" with a normalised
    graph.

    Solved as (D − α W) X = D^½ Y, F = D^½ X.

    Args:
        alpha: α in (0, 1); .99 is μ = 1/99.
    """
    alpha = check.check_number("alpha", alpha)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    system = LabelSystem(graph, labels, num_classes=num_classes, balance=False)  # its right side is Y
    root, dtype = graph.degree.sqrt()[:, None], graph.dtype
    rhs = root * system.rhs.to(dtype)
    diagonal = (1 - alpha) * graph.degree
    x = ops.laplacian_solve(
        graph.crow, graph.col, alpha * graph.weight, None, diagonal, rhs, rtol=rtol, max_iter=max_iter
    )
    return torch.where(root > 0, root * x.solution, system.rhs.to(dtype))


def mutual_neighbour_dissimilarity(graph: Graph) -> Tensor:
    """W_dis of MoM (Iscen et al., CVPR 2018): 1 on the edges that do not join mutual neighbours.

    Raises:
        ValueError: the graph does not know its mutual neighbours.
    """
    mutual = check_graph(graph).mutual
    if mutual is None:
        raise ValueError(
            "graph.mutual is None; this graph does not know which of its edges join mutual neighbours (knn_graph's do)"
        )
    return (~mutual).to(graph.dtype)


def control_dissimilarity(
    graph: Graph,
    labels: Tensor | np.ndarray,
    *,
    num_classes: int | None = None,
    mu: float = 1 / 99,
    mu_unlabeled: float = 0.0,
    balance: bool = True,
    rtol: float | None = None,
    max_iter: int = 1000,
) -> Tensor:
    """W_dis of the paper's "Control": (22) with Z̃_ij replaced by the L1-normalised F_i, whatever j."""
    graph = check_graph(graph).normalized()
    system = LabelSystem(graph, labels, num_classes=num_classes, mu=mu, mu_unlabeled=mu_unlabeled, balance=balance)
    probs = system.solve(rtol=rtol, max_iter=max_iter).probs.double()
    system.warn("control_dissimilarity")
    confidence, rows, col = confidence_of(probs), graph.rows, graph.col.long()
    out = torch.empty_like(graph.weight)
    for begin in range(0, graph.num_edges, EDGES_AT_ONCE):
        i, j = rows[begin : begin + EDGES_AT_ONCE], col[begin : begin + EDGES_AT_ONCE]
        out[begin : begin + EDGES_AT_ONCE] = (
            confidence[i] * confidence[j] * (1 - (probs[i] * probs[j]).sum(dim=1)).clamp_min(0)
        )
    return out


def oracle_dissimilarity(
    graph: Graph,
    true_labels: Tensor | np.ndarray,
    fraction: float,
    *,
    labels: Tensor | np.ndarray | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """W_dis = 1 on a random part of the edges between classes, as the oracle of Figure 4 knows them.

    Args:
        true_labels: [N] the class of every node.
        fraction: which part of them, in [0, 1].
        labels: [N], −1 where unlabelled: edges between two labelled nodes are left out, as their labels say it already.
        generator: of the draw, on the CPU.
    """
    check_graph(graph)
    fraction = check.check_fraction("fraction", fraction)
    true_labels = node_labels("true_labels", graph, true_labels)
    rows, col = graph.rows, graph.col.long()
    between = (true_labels[rows] != true_labels[col]) & (rows < col)
    if labels is not None:
        labels = node_labels("labels", graph, labels)
        between &= (labels[rows] < 0) | (labels[col] < 0)
    entries = between.nonzero()[:, 0]
    chosen = entries[
        torch.randperm(len(entries), generator=generator)[: round(fraction * len(entries))].to(entries.device)
    ]
    out = torch.zeros_like(graph.weight)
    out[chosen] = out[graph.reverse[chosen]] = 1
    return out


def shuffled_dissimilarity(graph: Graph, dissimilarity: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The same weights on other edges: the values of the undirected edges permuted. If W_dis chose its edges well,
    this costs accuracy.
    """
    dissimilarity = check_dissimilarity(check_graph(graph), dissimilarity)
    entries = (graph.rows <= graph.col).nonzero()[:, 0]
    values = dissimilarity[entries[torch.randperm(len(entries), generator=generator).to(entries.device)]]
    out = torch.empty_like(dissimilarity)
    out[entries] = out[graph.reverse[entries]] = values
    return out


def uniform_damping(
    graph: Graph,
    labels: Tensor | np.ndarray,
    dissimilarity: Tensor,
    *,
    num_classes: int | None = None,
    beta: float = 1.0,
    mu: float = 1 / 99,
    mu_unlabeled: float = 0.0,
    balance: bool = True,
    rtol: float | None = None,
    max_iter: int = 1000,
) -> MixedLabelPropagation:
    """β times the mean of D_dis added to every diagonal entry, in place of β(D_dis + W_dis): no edge differs
    from another.
    """
    beta = check.check_nonnegative("beta", beta)
    graph = check_graph(graph).normalized()
    dissimilarity = check_dissimilarity(graph, dissimilarity)
    system = LabelSystem(graph, labels, num_classes=num_classes, mu=mu, mu_unlabeled=mu_unlabeled, balance=balance)
    damping = beta * float(graph.sum_rows(dissimilarity.double()).mean())
    propagated = system.propagate(rtol=rtol, max_iter=max_iter)
    solution = system.solve(damping=damping, rtol=rtol, max_iter=max_iter)
    system.warn("uniform_damping")
    return MixedLabelPropagation(
        propagated=propagated, dissimilarity=torch.zeros_like(dissimilarity), **solution._asdict()
    )


def lpdr(
    graph: Graph,
    labels: Tensor | np.ndarray,
    dissimilarity: Tensor,
    *,
    num_classes: int | None = None,
    beta: float = 1.0,
    mu: float = 1 / 99,
    balance: bool = True,
    rtol: float = 1e-6,
    max_iter: int = 2000,
    seed: int = 0,
) -> LPDR:
    """Label propagation with dissimilarity regularisation (Zheng and Ip, 2013): (L + U − β(D_dis − W_dis)) G = (U/μ) Y,
    from (25).

    The dissimilar edges are taken off the Laplacian, so the matrix may be indefinite. Conjugate gradients show that by
    a direction of curvature <= 0; random columns are solved along with those of the labels, so that no such direction
    escapes them. Then the result says so, a warning is given, and the scores are the stationary point, by a direct
    solver or MINRES. Computed in float64.

    Section 4.5 of the paper sets λ = 1 and γ = 100 in LPDR's own notation. λ is β. γ is read as the weight of the
    labels, for which μ stands here; by default it is that of the other methods, so that the dissimilar edges alone make
    a difference.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    beta = check.check_nonnegative("beta", beta)
    rtol = check.check_positive("rtol", rtol)
    max_iter = check.check_count("max_iter", max_iter)
    seed = check.check_integer("seed", seed)
    double = check_graph(graph).to(torch.float64).normalized()
    dissimilarity = check_dissimilarity(double, dissimilarity)
    system = LabelSystem(double, labels, num_classes=num_classes, mu=mu, balance=balance)
    has_labels = system.offset[system.component] > 0
    classes, weight = system.rhs.shape[1], double.weight - beta * dissimilarity
    draw = torch.Generator().manual_seed(seed)
    random = torch.randn(graph.num_nodes, 4, generator=draw, dtype=torch.float64).to(graph.device)
    # Without labels the constant of a component is no direction of the problem: the matrix maps it to 0.
    component, count = graph.components
    means = sum_by(component, count, random) / sum_by(component, count, torch.ones_like(random))
    random -= torch.where(has_labels[:, None], 0, means[component])
    solution, _, residuals, curvatures = ops.graph.solve_with_curvature(
        double.crow,
        double.col,
        weight,
        None,
        system.diagonal,
        torch.cat([system.rhs, random], dim=1),
        rtol=rtol,
        max_iter=max_iter,
    )
    scores, residual, curvature = solution[:, :classes], float(residuals.max()), float(curvatures.min())
    indefinite = curvature <= 0
    if indefinite:
        warnings.warn(
            f"lpdr: the system is not positive definite (curvature {curvature:.2g}), so its objective has no minimum; "
            "the scores are a stationary point",
            RuntimeWarning,
            stacklevel=2,
        )
        scores, residual = _stationary_point(double, weight, system, has_labels, rtol, max_iter)
    if not residual <= 10 * rtol:
        warnings.warn(
            f"lpdr did not converge to rtol = {rtol:g} (largest relative residual {residual:.2g}): raise max_iter"
            f" ({max_iter}) or rtol",
            RuntimeWarning,
            stacklevel=2,
        )
    return LPDR(scores.to(graph.dtype), torch.where(has_labels, scores.argmax(dim=1), -1), indefinite, curvature)


def _stationary_point(
    graph: Graph, weight: Tensor, system: LabelSystem, has_labels: Tensor, rtol: float, max_iter: int
) -> tuple[Tensor, float]:
    """The solution of an indefinite system, 0 in components without labels, and its largest relative residual."""
    from scipy import sparse

    off_diagonal = sparse.csr_array(
        (weight.cpu().numpy(), graph.col.cpu().numpy(), graph.crow.cpu().numpy()), shape=(graph.num_nodes,) * 2
    )
    kept = has_labels.cpu().numpy()
    matrix = (sparse.diags_array(off_diagonal.sum(axis=1) + system.diagonal.cpu().numpy()) - off_diagonal).tocsr()[
        kept
    ][:, kept]
    rhs = system.rhs.cpu().numpy()[kept]
    solution = _solve_indefinite(matrix, rhs, rtol, max_iter)
    lengths = np.linalg.norm(rhs, axis=0)
    residual = np.linalg.norm(rhs - matrix @ solution, axis=0) / np.where(lengths > 0, lengths, 1)
    scores = torch.zeros(system.rhs.shape, dtype=torch.float64)
    scores[has_labels.cpu()] = torch.from_numpy(solution)
    return scores.to(graph.device), float(residual.max())


def _solve_indefinite(matrix: Any, rhs: np.ndarray, rtol: float, max_iter: int) -> np.ndarray:
    """Directly where the dense matrix is small and regular, by MINRES where it is not."""
    from scipy.sparse.linalg import minres

    if len(rhs) <= DENSE_NODES:
        solution, singular = torch.linalg.solve_ex(torch.from_numpy(matrix.toarray()), torch.from_numpy(rhs))
        if int(singular) == 0:
            return solution.numpy()
    # MINRES takes its tolerance relative to ‖A‖‖x‖ + ‖b‖, so it is given a smaller one.
    return np.stack([minres(matrix, column, rtol=0.01 * rtol, maxiter=max_iter)[0] for column in rhs.T], axis=1)
