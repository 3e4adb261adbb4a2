# SPDX-License-Identifier: BSD-3-Clause
"""Label propagation and mixed label propagation (Zhuang and Moulin, CVPR 2023), equations (12), (16) and (19)-(24).

The reading of the paper that is computed here:

- **Scale.** (L + U) F = (U/μ) Y, the paper's F divided by μ. The logits D_ii F_i of (20) then have no unit, as long as
  μ is small beside D_ii. W_dis lies in [0, 1] whatever W is, so mixed label propagation takes W/w̄, w̄ the mean
  positive weight: a dissimilar edge acts as β w̄ W_dis and a label as μ w̄ would on W, and W and c W give the same
  result.
- **Class balance.** A component of the graph with N_K labels of m_K classes, n_cK of them of class c, has u_i = μ
  N_K/(m_K n_cK) on its labelled rows of class c: (16) itself where every class has as many labels. Without it the class
  with more labels takes over.
- **Deviation.** F is a large constant c_K = 1/(m_K μ) per component and a small signal, which rounding hides. So F̃ = F
  − c_K is what :func:`label_propagation` returns, and what is solved for (:mod:`ssmkernels.graph.deviation`). Neither
  the largest class, (13), nor the softmax of (20) sees the constant.
- **Pairs.** The sum of (24) takes each pair once: (L + U + β(D_dis + W_dis)) G = (U/μ) Y.

Of a :class:`~ssmkernels.graph.SplitGraph` every rank gives the labels of its rows and gets what is of its rows: N is
then their number, E that of their entries. The classes, components and iterations are those of all ranks. On a mesh of
rows and classes a rank solves for its share of the classes, and gets their columns of what has one for every class;
labels and confidences are those of all classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmkernels import ops
from ssmkernels.distributed import (
    Group,
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    is_distributed,
    rank_of,
    split_rows,
    world_size,
)
from ssmkernels.graph.deviation import Deviation, NearlySingular
from ssmkernels.graph.parts import AnyGraph, class_group, is_any, largest, num_rows
from ssmkernels.graph.split import SplitGraph
from ssmkernels.graph.split.dissimilarity import leave_one_edge_out, mirrored
from ssmkernels.graph.structure import Graph
from ssmkernels.ops import _checks as check

RTOL = 1e-8  # of the solves


class MixedLabelPropagation(NamedTuple):
    """What :func:`mixed_label_propagation` returns.

    A row is undecided if no class has a positive score there, or no label is in its component of the graph.
    """

    scores: Tensor
    """[N, C] G."""
    probs: Tensor
    """[N, C] G̃: G with what is below 0 as 0, rows summing to 1; 0 in undecided rows."""
    confidence: Tensor
    """[N] ω(G̃) = 1 − H(G̃)/log C, 0 where undecided."""
    pseudo_labels: Tensor
    """[N] int64, the class of the highest score, −1 where undecided."""
    propagated: Tensor
    """[N, C] F̃ of W/w̄, see :func:`label_propagation`."""
    dissimilarity: Tensor
    """[E] W_dis."""
    iterations: Tensor
    """[C] int64, of the solve for G."""
    residual: Tensor
    """[C] relative residual of that solve."""

    @property
    def num_undecided(self) -> int:
        """How many rows have the pseudo-label −1."""
        return int((self.pseudo_labels < 0).sum())


class Scores(NamedTuple):
    """What a system gives: :class:`MixedLabelPropagation` without what is of mixed label propagation alone."""

    scores: Tensor
    probs: Tensor
    confidence: Tensor
    pseudo_labels: Tensor
    iterations: Tensor
    residual: Tensor


def label_propagation(
    graph: AnyGraph,
    labels: Tensor | np.ndarray,
    *,
    num_classes: int | None = None,
    mu: float = 1 / 99,
    mu_unlabeled: float = 0.0,
    balance: bool = True,
    rtol: float | None = None,
    max_iter: int = 1000,
    class_block: int | None = None,
) -> Tensor:
    """F̃ [N, C]: the solution F of (L + U) F = (U/μ) Y less c_K = 1/(m_K μ) in every component with labels, 0 in the
    others.

    ``F̃.argmax(1)`` is the pseudo-label of (13), the softmax of (20) takes it as it is. With ``balance=False`` it is
    (16) literally, with ``balance=False, mu_unlabeled=mu`` the original label propagation, (12). W is taken as it is,
    at any scale, and μ with it; the pseudo-labels are those of the exact solution where the largest positive weight is
    at most 1e12 times the smallest.

    Args:
        graph: N nodes, or this rank's rows of a split graph; F̃ comes in the dtype of its weights, and what depends on
            it has the accuracy of float64.
        labels: [N] int64 in [0, C), −1 where unlabelled; at least one label.
        num_classes: C; the largest label and one if not given.
        mu: μ > 0, weight of a label, in the unit of W.
        mu_unlabeled: ≥ 0, weight of the pull to 0 on unlabelled rows, in the unit of W.
        balance: give every class of a component the same weight, however many labels it has.
        rtol: tolerance of the solve, on the deviation; 1e-8 by default.
        max_iter: of the solve, ≥ 1; a RuntimeWarning says if it was not enough.
        class_block: solve for so many classes at a time, ≥ 1: the float64 work space is [N, class_block] and no longer
            [N, C].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    system = LabelSystem(
        graph,
        labels,
        num_classes=num_classes,
        mu=mu,
        mu_unlabeled=mu_unlabeled,
        balance=balance,
        class_block=class_block,
    )
    propagated = system.propagate(rtol=rtol, max_iter=max_iter)
    system.warn("label_propagation")
    return propagated


def mixed_label_propagation(
    graph: AnyGraph,
    labels: Tensor | np.ndarray,
    *,
    num_classes: int | None = None,
    beta: float = 1.0,
    logit_scale: float = 4.0,
    mu: float = 1 / 99,
    mu_unlabeled: float = 0.0,
    balance: bool = True,
    dissimilarity: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int = 1000,
    normalize_confidence: bool = False,
    class_block: int | None = None,
) -> MixedLabelPropagation:
    """Pseudo-labels with confidence, from similar and dissimilar edges.

    With W/w̄ for W, w̄ being the mean of the positive weights, so that the result is the same for W and c W: F̃ by
    :func:`label_propagation`, W_dis from it by (19)-(22), and G from (L + U + β(D_dis + W_dis)) G = (U/μ) Y, (23) and
    (24).

    Args:
        graph, labels, num_classes, balance, rtol, max_iter, class_block: as :func:`label_propagation`.
        mu, mu_unlabeled: likewise, in units of w̄.
        beta: β ≥ 0, weight of the dissimilar edges, in units of w̄.
        logit_scale: λ > 0 of (20).
        dissimilarity: [E] W_dis on the edges of the graph, finite, ≥ 0 and symmetric, in place of (19)-(22).
        normalize_confidence: divide the confidence by its maximum.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    graph = check_any_graph(graph).normalized()
    system = LabelSystem(
        graph,
        labels,
        num_classes=num_classes,
        mu=mu,
        mu_unlabeled=mu_unlabeled,
        balance=balance,
        class_block=class_block,
    )
    result = mix(system, dissimilarity, beta=beta, logit_scale=logit_scale, rtol=rtol, max_iter=max_iter)
    system.warn("mixed_label_propagation")
    if normalize_confidence:
        tiny = torch.finfo(graph.dtype).tiny
        result = result._replace(
            confidence=result.confidence / _largest_of_all(graph, result.confidence).clamp_min(tiny)
        )
    return result


def mix(
    system: LabelSystem,
    dissimilarity: Tensor | None = None,
    *,
    beta: float = 1.0,
    logit_scale: float = 4.0,
    rtol: float | None = None,
    max_iter: int = 1000,
) -> MixedLabelPropagation:
    """:func:`mixed_label_propagation` on a system of the normalised graph, without its warning."""
    beta = check.check_nonnegative("beta", beta)
    logit_scale = check.check_positive("logit_scale", logit_scale)
    if dissimilarity is not None:
        dissimilarity = check_dissimilarity(system.graph, dissimilarity)
    propagated = system.propagate(rtol=rtol, max_iter=max_iter)
    if dissimilarity is None:
        dissimilarity = dissimilarity_of(system.graph, propagated, logit_scale)
    result = system.solve(None if beta == 0 else beta * dissimilarity, rtol=rtol, max_iter=max_iter)
    return MixedLabelPropagation(propagated=propagated, dissimilarity=dissimilarity, **result._asdict())


def dissimilarity_of(graph: AnyGraph, propagated: Tensor, logit_scale: float = 4.0) -> Tensor:
    """[E] W_dis of (22); 0 on a stored edge of weight 0, and where there is a single class."""
    if int(all_reduce_sum(torch.tensor(propagated.shape[1]), group=class_group(graph))) == 1:
        return torch.zeros_like(graph.weight)
    if isinstance(graph, SplitGraph):
        dissimilarity = leave_one_edge_out(graph, propagated, logit_scale=logit_scale)
        # The two ranks of an edge rounded it for themselves.
        dissimilarity = torch.maximum(dissimilarity, mirrored(graph, dissimilarity))
    else:
        dissimilarity = ops.leave_one_edge_out(
            graph.crow, graph.col, graph.reverse, graph.weight, propagated, logit_scale=logit_scale
        )
    return torch.where(graph.weight > 0, dissimilarity, 0)


def confidence_of(probs: Tensor) -> Tensor:
    """[N] ω = 1 − H/log C of rows [N, C] that sum to 1, equation (21); 0 for a row of zeros, and 1 or 0 where C = 1."""
    check.check_tensor("probs", probs, "[N, C]", 2)
    check.check_floating("probs", probs)
    if probs.shape[1] == 0:
        raise ValueError(f"probs must be [N, C] with C > 0, got shape {list(probs.shape)}")
    wide = probs.to(check.compute_dtype(probs.dtype))
    return _confidence(wide, probs.shape[1], "local").to(probs.dtype)


def _confidence(probs: Tensor, classes: int, group: Group) -> Tensor:
    """:func:`confidence_of` rows of so many classes, whose columns are split over the ranks of a group."""
    entropy, present = -torch.xlogy(probs, probs).sum(dim=1), probs.any(dim=1)
    if is_distributed(group):
        entropy, present = all_reduce_sum(torch.stack([entropy, present.to(entropy)]), group=group)
    if classes == 1:
        return all_reduce_sum(probs.sum(dim=1), group=group)
    return torch.where(present.bool(), (1 - entropy / math.log(classes)).clamp_min(0), 0)


class LabelSystem:
    """The linear systems of one graph and its labels; see the head of this file for what they are."""

    def __init__(
        self,
        graph: AnyGraph,
        labels: Tensor | np.ndarray,
        *,
        num_classes: int | None = None,
        mu: float = 1 / 99,
        mu_unlabeled: float = 0.0,
        balance: bool = True,
        class_block: int | None = None,
    ) -> None:
        check_any_graph(graph)
        mu = check.check_positive("mu", mu)
        if 1 / mu > torch.finfo(graph.dtype).max:
            raise ValueError(f"mu is too small: 1/mu must be finite in {graph.dtype}, the dtype of graph; got {mu}")
        mu_unlabeled = check.check_nonnegative("mu_unlabeled", mu_unlabeled)
        if check.values_are_checked(graph.weight):
            check.check_weights("graph.weight", graph.weight)  # which may have been written since the graph was made
        self.graph = graph
        labels, self.num_classes = _checked_labels(graph, labels, num_classes)
        self.class_block = self.num_classes if class_block is None else check.check_count("class_block", class_block)
        self.classes = class_group(graph)
        own = split_rows(self.num_classes, rank_of(self.classes), world_size(self.classes))
        self.own = range(own.start, own.stop)  # the classes whose columns are here
        self.component, count = graph.components
        self.rows = (labels >= 0).nonzero()[:, 0]  # with labels, which are self.which
        self.which = labels[self.rows]
        # What a component has of a class, for the pairs of them that there are. The sums over components are of a few
        # numbers each, and their order is fixed on the CPU.
        pairs, place, per_pair = _counted(graph, (self.component[self.rows] * self.num_classes + self.which).cpu())
        self.pair_component, self.pair_class = pairs // self.num_classes, pairs % self.num_classes
        in_component = torch.bincount(self.pair_component, per_pair, minlength=count)[self.pair_component]  # N_K
        of_classes = torch.bincount(self.pair_component, minlength=count)  # m_K
        share = torch.ones(len(pairs), dtype=torch.float64)
        # Sums of the right side over components, in one division each: the constants of two classes differ by no
        # rounding.
        self.per_pair = per_pair.double()
        if balance:
            share = in_component / (of_classes[self.pair_component] * per_pair)
            self.per_pair = in_component / of_classes[self.pair_component]
        self.share = share[place].to(graph.device)
        self.diagonal = torch.full((num_rows(graph),), mu_unlabeled, dtype=torch.float64, device=graph.device)
        self.diagonal[self.rows] = mu * self.share
        self.shortfall = ""  # what a solve did not reach, in words
        of_classes = of_classes.to(graph.device)
        self.offset = torch.where(of_classes > 0, 1 / (mu * of_classes.double().clamp_min(1)), 0.0)  # c_K

    @property
    def rhs(self) -> Tensor:
        """(U/μ) Y, [N, C] float64."""
        return self._rhs_of(self.own)

    def propagate(self, *, rtol: float | None, max_iter: int) -> Tensor:
        """F̃ [N, C]."""
        out = self.graph.weight.new_empty(num_rows(self.graph), len(self.own))
        largest = Largest(self.component, self.own.start)
        for classes, solution in self._solutions(NearlySingular(self.graph, self.diagonal, None), rtol, max_iter):
            deviation = solution.values + (solution.constant - self.offset[:, None])[self.component]
            largest.add(deviation, classes.start)
            out[:, self._columns(classes)] = deviation.to(out.dtype)
            del solution, deviation  # while the next block is solved for
        largest.merge(self.classes)
        return largest.keep(out)

    def solve(
        self,
        dissimilarity: Tensor | None = None,
        *,
        damping: float = 0.0,
        rtol: float | None = None,
        max_iter: int = 1000,
    ) -> Scores:
        """(L + U + D_dis + W_dis + damping) G = (U/μ) Y, and what follows from G."""
        system = NearlySingular(self.graph, self.diagonal + damping, dissimilarity)
        # The largest constant of a component, that of every class present where classes are balanced
        most = system.per_whole[:, 0] * self._largest_total()
        dtype, at_once = self.graph.dtype, self.class_block >= self.num_classes
        scores = self.diagonal.new_empty(num_rows(self.graph), len(self.own), dtype=torch.float64 if at_once else dtype)
        largest = Largest(self.component, self.own.start)
        iterations, residual = [self.component[:0]], [self.diagonal[:0]]
        for classes, solution in self._solutions(system, rtol, max_iter):
            deviation = solution.values + (solution.constant - most[:, None])[self.component]
            largest.add(deviation, classes.start)
            scores[:, self._columns(classes)] = (deviation + most[self.component, None]).to(scores.dtype)
            iterations.append(solution.iterations)
            residual.append(solution.residual)
            del solution, deviation  # while the next block is solved for
        largest.merge(self.classes)
        highest = largest.value + most[self.component]
        decided = (highest > 0) & (self.offset[self.component] > 0)
        probs, confidence = self._probabilities(scores, highest, decided)
        return Scores(
            scores=largest.keep(scores.to(dtype), most[self.component]),
            probs=probs,
            confidence=confidence,
            pseudo_labels=torch.where(decided, largest.column, -1),
            iterations=torch.cat(iterations),
            residual=torch.cat(residual).to(dtype),
        )

    def warn(self, caller: str) -> None:
        """A RuntimeWarning if a solve did not converge; ``caller`` is called by the user."""
        if self.shortfall:
            warnings.warn(f"{caller} {self.shortfall}", RuntimeWarning, stacklevel=3)

    def _solutions(
        self, system: NearlySingular, rtol: float | None, max_iter: int
    ) -> Iterator[tuple[range, Deviation]]:
        """The columns of (U/μ) Y that are here in blocks, solved for."""
        rtol = RTOL if rtol is None else check.check_positive("rtol", rtol)
        max_iter = check.check_count("max_iter", max_iter)
        residuals = [self.diagonal.new_zeros(1)]
        for start in range(self.own.start, self.own.stop, self.class_block):
            classes = range(start, min(start + self.class_block, self.own.stop))
            solution = system.solve(self._rhs_of(classes), self._totals_of(classes), rtol=rtol, max_iter=max_iter)
            residuals.append(solution.residual)
            yield classes, solution
            del solution
        largest_residual = torch.cat(residuals).max()
        if is_distributed(self.classes):
            largest_residual = all_reduce_max(largest_residual.nan_to_num(nan=torch.inf), group=self.classes)
        residual = float(largest_residual)
        # Conjugate gradients may drift from the residual by rounding; NaN is no convergence
        if not residual <= 10 * rtol:
            self.shortfall = (
                f"did not converge to rtol = {rtol:g} (largest relative residual {residual:.2g}): raise max_iter"
                f" ({max_iter}) or rtol"
            )

    def _columns(self, classes: range) -> slice:
        """Those of some classes among the columns that are here."""
        return slice(classes.start - self.own.start, classes.stop - self.own.start)

    def _probabilities(self, scores: Tensor, highest: Tensor, decided: Tensor) -> tuple[Tensor, Tensor]:
        """G̃ [N, C] and ω [N] of scores [N, C] and the ``highest`` of each row; 0 where a row is not ``decided``. So
        many rows at a time as [N, class_block] has entries for.
        """
        dtype = self.graph.dtype
        probs = torch.empty_like(scores, dtype=dtype)
        confidence = torch.empty_like(highest, dtype=dtype)
        nodes = len(scores)
        at_once = max(1, nodes * self.class_block // self.num_classes)
        for start in range(0, nodes, at_once):
            rows = slice(start, start + at_once)
            share = scores[rows].double().clamp_min(0) / highest[rows, None]  # no sum of them is tiny or infinite
            share = torch.where(decided[rows, None], share, 0)
            share = share / all_reduce_sum(share.sum(dim=1, keepdim=True), group=self.classes).clamp_min(1)
            probs[rows] = share.to(dtype)
            confidence[rows] = _confidence(share, self.num_classes, self.classes).to(dtype)
        return probs, confidence

    def _rhs_of(self, classes: range) -> Tensor:
        """[N, classes] float64."""
        rhs = self.diagonal.new_zeros(num_rows(self.graph), len(classes))
        inside = (self.which >= classes.start) & (self.which < classes.stop)
        rhs[self.rows[inside], self.which[inside] - classes.start] = self.share[inside]
        return rhs

    def _totals_of(self, classes: range) -> Tensor:
        """[components, classes] float64, the sums of the right side over components."""
        totals = torch.zeros(len(self.offset), len(classes), dtype=torch.float64)
        inside = (self.pair_class >= classes.start) & (self.pair_class < classes.stop)
        totals[self.pair_component[inside], self.pair_class[inside] - classes.start] = self.per_pair[inside]
        return totals.to(self.graph.device)

    def _largest_total(self) -> Tensor:
        """[components] float64."""
        largest = torch.zeros(len(self.offset), dtype=torch.float64)
        return largest.scatter_reduce(0, self.pair_component, self.per_pair, "amax").to(self.graph.device)


class Largest:
    """The largest entry of each row of scores [N, C] whose columns come in blocks, the first of equal ones, and what
    rounding leaves of it.

    Args:
        rows: [N], on the device of the scores.
        first: the class of the first column that is here.
    """

    def __init__(self, rows: Tensor, first: int = 0) -> None:
        self.first = first
        self.value = torch.full_like(rows, -torch.inf, dtype=torch.float64)
        self.second = self.value.clone()
        self.column = torch.zeros_like(rows, dtype=torch.int64)

    def add(self, block: Tensor, start: int) -> None:
        """Columns [N, some] float64, of which the first is column ``start``."""
        value, column = block.max(dim=1)
        second = block.scatter(1, column[:, None], -torch.inf).amax(dim=1)
        self._include(value, column + start, second)

    def merge(self, group: Group) -> None:
        """With what the other ranks of a group have of other columns."""
        if not is_distributed(group):
            return
        own = torch.stack([self.value, self.column.double(), self.second])
        self.value, self.second = (torch.full_like(self.value, -torch.inf) for _ in range(2))
        for value, column, second in all_gather_rows(own[None], group=group):
            self._include(value, column.long(), second)

    def _include(self, value: Tensor, column: Tensor, second: Tensor) -> None:
        is_larger = value > self.value
        self.second = torch.where(is_larger, torch.maximum(self.value, second), torch.maximum(self.second, value))
        self.column = torch.where(is_larger, column, self.column)
        self.value = torch.where(is_larger, value, self.value)

    def keep(self, rounded: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """``rounded`` [N, C], which is the scores with ``shift`` [N] added in some dtype, its largest entry being the
        largest still: one unit in the last place up, if need be. Written in place.
        """
        width = rounded.shape[1]
        if width == 0:
            return rounded
        is_here = ((self.column >= self.first) & (self.column < self.first + width))[:, None]
        column = (self.column - self.first).clamp(0, width - 1)[:, None]
        largest, rival = rounded.gather(1, column), (self.second + shift).to(rounded.dtype)[:, None]
        is_hidden = is_here & (self.value > self.second)[:, None] & (rival >= largest)
        above = rival.nextafter(torch.full_like(rival, torch.inf))
        return rounded.scatter_(1, column, torch.where(is_hidden, above, largest))


def check_graph(graph: Graph) -> Graph:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a ssmkernels.graph.Graph, got {type(graph).__name__}")
    return graph


def check_any_graph(graph: AnyGraph) -> AnyGraph:
    if not isinstance(graph, (Graph, SplitGraph)):
        raise TypeError(f"graph must be a ssmkernels.graph.Graph or SplitGraph, got {type(graph).__name__}")
    return graph


def check_dissimilarity(graph: AnyGraph, dissimilarity: Tensor) -> Tensor:
    """[E] finite, ≥ 0 and symmetric, in the dtype of the graph."""
    if not isinstance(dissimilarity, Tensor):
        raise TypeError(f"dissimilarity must be a tensor [E], got {type(dissimilarity).__name__}")
    if dissimilarity.shape != graph.weight.shape:
        raise ValueError(f"dissimilarity must be [E] = [{graph.num_edges}], got shape {list(dissimilarity.shape)}")
    if dissimilarity.device != graph.device:
        raise ValueError(f"dissimilarity is on {dissimilarity.device} but the graph is on {graph.device}")
    dissimilarity = dissimilarity.detach().to(graph.dtype)
    if is_any(graph, ~((dissimilarity >= 0) & (dissimilarity < torch.inf))):
        raise ValueError("dissimilarity must be finite and >= 0")
    mirror = mirrored(graph, dissimilarity) if isinstance(graph, SplitGraph) else dissimilarity[graph.reverse]
    if is_any(graph, ~torch.isclose(dissimilarity, mirror, rtol=1e-5, atol=0)):
        raise ValueError("dissimilarity must be symmetric: the same for both directions of an edge")
    return dissimilarity


def node_labels(name: str, graph: AnyGraph, labels: Tensor | np.ndarray) -> Tensor:
    """Labels [N] int64 on the device of the graph; an array is put there."""
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(np.require(labels, requirements=["C", "W"])).to(graph.device)
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor or an array [N], got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if labels.shape != (num_rows(graph),):
        raise ValueError(f"{name} must be [N] = [{num_rows(graph)}], got shape {list(labels.shape)}")
    if labels.device != graph.device:
        raise ValueError(
            f"{name} are on {labels.device} but the graph is on {graph.device}; they must be on one device"
        )
    return labels


def _counted(graph: AnyGraph, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different ones of ``values``, on all ranks, ascending; the place there of each value that is here; and how
    often each is, in float64, on all ranks.
    """
    different, place, times = torch.unique(values, return_inverse=True, return_counts=True)
    if not isinstance(graph, SplitGraph):
        return different, place, times.double()
    everyone = all_gather_rows(torch.stack([different, times], dim=1).to(graph.device), group=graph.group).cpu()
    of_all, where = everyone[:, 0].unique(return_inverse=True)
    return of_all, torch.searchsorted(of_all, values), torch.bincount(where, everyone[:, 1].double())


def _largest_of_all(graph: AnyGraph, values: Tensor) -> Tensor:
    """The largest of some numbers ≥ 0, on all ranks; 0 where there are none."""
    return largest(graph, values.max() if len(values) else values.new_zeros(()))


def _checked_labels(graph: AnyGraph, labels: Tensor | np.ndarray, num_classes: int | None) -> tuple[Tensor, int]:
    labels = node_labels("labels", graph, labels)
    bounds = torch.stack(torch.aminmax(labels)) if len(labels) else labels.new_tensor([-1, -1])
    low, high = largest(graph, bounds * bounds.new_tensor([-1, 1])).tolist()
    low = -low
    if low < -1:
        raise ValueError(f"labels must be -1 (unlabelled) or a class from 0 on, got {low}")
    if high < 0:
        raise ValueError("labels must have at least one label; all are -1")
    num_classes = high + 1 if num_classes is None else check.check_integer("num_classes", num_classes)
    if high >= num_classes:
        raise ValueError(f"labels must be below num_classes = {num_classes}, got {high}")
    return labels, num_classes
