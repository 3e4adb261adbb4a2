# SPDX-License-Identifier: BSD-3-Clause
"""Calls of label propagation and of what is compared with it, and their exact results."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from fuzz import values as v
from fuzz.contents import Tensors
from fuzz.graphs import SCALE, csr, draw_linked, symmetric
from fuzz.oracle import Finding, Target, Undecided
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ssmkernels import graph, reference
from ssmkernels.graph import Graph, comparisons

MOST_NODES = 9  # of a system that is solved in fractions
EXPONENT = 6  # of the weights of one graph: beyond a ratio of 1e12, scores are not promised
NEAR = 1e-3  # share of the range of a component's scores within which the order of two scores is not judged
CLASSES = Number((2, 3, 4), least=0, integer=True, optional=True, shapes=True)
MU = Number((1 / 99, 1.0, 0.1), least=0, above=True)
MU_UNLABELED = Number((0.0, 0.0, 1 / 99, 0.5), least=0)
RTOL = Number((1e-8, 1e-10), least=0, above=True, optional=True)
MAX_ITER = Number((1000, 2000), least=1, integer=True)
BETA = Number((1.0, 0.0, 0.5, 10.0), least=0)
SYSTEM = {"num_classes": CLASSES, "mu": MU, "mu_unlabeled": MU_UNLABELED, "rtol": RTOL, "max_iter": MAX_ITER}


def draw_graph(draw: Draw, nodes: int, *, mutual: bool = False) -> Graph:
    dtype = v.dtype(draw, v.WIDE_FLOATS)
    linked = draw_linked(draw, nodes)
    arrays = csr(linked)
    mutual_entries = draw_linked(draw, nodes)[linked] if mutual and draw(st.booleans()) else None
    weight = symmetric(draw, linked, dtype, EXPONENT)[linked]
    return Graph(arrays["crow"], arrays["col"], weight, mutual=mutual_entries)


def draw_system(draw: Draw) -> dict[str, Any]:
    nodes = draw(st.integers(1, MOST_NODES))
    classes = draw(st.integers(1, 4))
    labels = v.classes(draw, (nodes,), 2 * classes) - classes
    labels = labels.clamp_min(-1)
    labels[draw(st.integers(0, nodes - 1))] = classes - 1
    return {
        "graph": draw_graph(draw, nodes, mutual=True),
        "labels": v.layout(draw, labels, without=("expanded",)),
        "num_classes": CLASSES.draw(draw) if classes <= 2 else None,
        "mu": MU.draw(draw),
        "mu_unlabeled": MU_UNLABELED.draw(draw),
        "balance": draw(st.booleans()),
        "rtol": RTOL.draw(draw),
        "max_iter": MAX_ITER.draw(draw),
    }


def converged(function: Callable[..., Any], **arguments: Any) -> Any:
    """The result, unless a warning says that the iteration did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return function(**arguments)
        except RuntimeWarning as warning:
            raise Undecided from warning


class _System:
    """(L + U) F = (U/μ) Y in fractions."""

    def __init__(self, weight: np.ndarray, labels: Tensor, classes: int, mu: float, mu_unlabeled: float, balance: bool):
        self.count, self.component = connected_components(weight > 0, directed=False)
        self.labels, self.classes, self.mu = labels.tolist(), classes, Fraction(mu)
        self.weight = [[Fraction(float(x)) for x in row] for row in weight]
        members = [
            [self.labels[i] for i in np.flatnonzero(self.component == k) if self.labels[i] >= 0]
            for k in range(self.count)
        ]
        self.offset = [1 / (self.mu * len(set(own_labels))) if own_labels else Fraction(0) for own_labels in members]
        self.diagonal, self.rhs = [], []
        for label, k in zip(self.labels, self.component, strict=True):
            own_labels = members[k]
            share = (
                Fraction(len(own_labels), len(set(own_labels)) * own_labels.count(label))
                if balance and label >= 0
                else Fraction(1)
            )
            self.diagonal.append(self.mu * share if label >= 0 else Fraction(mu_unlabeled))
            self.rhs.append([share if label == c else Fraction(0) for c in range(classes)])

    def solve(self, dissimilarity: np.ndarray | None = None, damping: float = 0.0) -> list[list[Fraction]]:
        """The solution; 0 where a component has neither labels nor anything that draws it to 0."""
        nodes = len(self.labels)
        other = [[Fraction(0)] * nodes] * nodes
        if dissimilarity is not None:
            other = [[Fraction(float(x)) for x in row] for row in dissimilarity]
        rows = []
        for i in range(nodes):
            row = [other[i][j] - self.weight[i][j] for j in range(nodes)]
            row[i] += self.diagonal[i] + sum(self.weight[i]) + sum(other[i]) + Fraction(damping)
            rows.append(row + self.rhs[i])
        return _eliminated(rows, nodes, self.classes)


def _eliminated(rows: list[list[Fraction]], nodes: int, columns: int) -> list[list[Fraction]]:
    for i in range(nodes):  # a symmetric matrix that is positive semi-definite needs no exchange of rows
        if rows[i][i] == 0:
            continue
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(nodes):
            if j != i and rows[j][i]:
                factor = rows[j][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[nodes:] if row[i] else [Fraction(0)] * columns for i, row in enumerate(rows)]


def _dense(weight: Tensor, of: Graph) -> np.ndarray:
    out = np.zeros((of.num_nodes, of.num_nodes))
    out[of.rows.numpy(), of.col.long().numpy()] = weight.double().numpy()
    return np.maximum(out, out.T)


def _system(arguments: dict[str, Any]) -> _System:
    labels = torch.as_tensor(arguments["labels"])
    classes = arguments["num_classes"]
    classes = int(labels.max()) + 1 if classes is None else int(classes)
    mu, mu_unlabeled = float(arguments["mu"]), float(arguments["mu_unlabeled"])
    weight = _dense(arguments["graph"].weight, arguments["graph"])
    return _System(weight, labels, classes, mu, mu_unlabeled, arguments["balance"])


def _check_scores(
    name: str, scores: Tensor, exact: list[list[Fraction]], system: _System, joined: np.ndarray | None = None
) -> None:
    """Close beside the range of the scores in a component, also over the dissimilar edges ``joined`` [N, N]."""
    count, component = system.count, system.component
    if joined is not None:
        same = component[:, None] == component
        count, component = connected_components(same | (joined > 0), directed=False)
    for k in range(count):
        inside = np.flatnonzero(component == k)
        values = [exact[i][c] for i in inside for c in range(system.classes)]
        span, size = float(max(values) - min(values)), float(max(map(abs, values)))
        largest = torch.finfo(scores.dtype).max
        if size > 0.5 * largest:
            continue
        offset = float(max(system.offset[c] for c in system.component[inside]))
        rounding = torch.finfo(scores.dtype).eps * size + torch.finfo(torch.float64).eps * offset
        allowed = NEAR * span + 4 * rounding + 4 * torch.finfo(scores.dtype).tiny
        for i in inside:
            for c in range(system.classes):
                score = float(scores[i, c])
                if not abs(score - float(exact[i][c])) <= allowed:
                    truth = float(exact[i][c])
                    raise Finding(f"{name}[{i}, {c}] is {score:.9g}, exactly {truth:.9g}, of a range of {span:.3g}")


def _check_propagated(arguments: dict[str, Any], results: Tensors) -> None:
    scores, system = results["value"], _system(arguments)
    _expect(scores.shape == (len(system.labels), system.classes), f"shape {list(scores.shape)}")
    _expect(scores.dtype == arguments["graph"].dtype, f"dtype {scores.dtype}")
    exact = system.solve()
    offset = [system.offset[k] for k in system.component]
    shifted = [[value - less for value in row] for row, less in zip(exact, offset, strict=True)]
    _check_scores("F", scores, shifted, system)


def _check_mixed(arguments: dict[str, Any], results: Tensors) -> None:
    given = arguments["graph"].normalized()
    system = _system(arguments | {"graph": given})
    dissimilarity, classes = results["dissimilarity"], system.classes
    for name in ("scores", "probs", "propagated"):
        _expect(results[name].shape == (len(system.labels), classes), f"{name} has shape {list(results[name].shape)}")
        _expect(bool(results[name].isfinite().all()), f"{name} is not finite")
    _expect(bool(((dissimilarity >= 0) & (dissimilarity <= 1 + 1e-6)).all()), "W_dis leaves [0, 1]")
    if classes > 1:
        expected = reference.leave_one_edge_out(
            *(given.crow, given.col, given.reverse, given.weight.double(), results["propagated"].double()),
            logit_scale=float(arguments["logit_scale"]),
        )
        expected = torch.where(given.weight > 0, expected, 0)
        size = results["propagated"].abs().amax() * given.degree.amax() if len(dissimilarity) else 0
        tolerance = min(1.0, 1e-5 * (1 + float(arguments["logit_scale"]) * float(size)))
        close = torch.allclose(dissimilarity.double(), expected, rtol=0, atol=tolerance)
        _expect(close, "W_dis is not that of F")
    _check_decisions(results, system)
    beta = float(arguments["beta"])
    if beta <= 1e6:
        joined = _dense(beta * dissimilarity.double(), given)
        _check_scores("scores", results["scores"], system.solve(joined), system, joined)


def _check_decisions(results: Tensors, system: _System) -> None:
    probs, confidence, labels = results["probs"], results["confidence"], results["pseudo_labels"]
    decided = labels >= 0
    sums = probs.double().sum(dim=1)
    _expect(bool(((sums - 1).abs()[decided] < 1e-5).all()), "rows of probs do not sum to 1")
    _expect(bool((probs[~decided] == 0).all()), "an undecided row has probabilities")
    _expect(bool(((confidence >= 0) & (confidence <= 1 + 1e-6)).all()), "confidence leaves [0, 1]")
    _expect(bool((confidence[~decided] == 0).all()), "an undecided row has confidence")
    labelled = torch.tensor([system.offset[k] > 0 for k in system.component])
    _expect(not bool((decided & ~labelled).any()), "a component without labels has a pseudo-label")


def _expect(right: bool, what: str) -> None:
    if not right:
        raise Finding(what)


def _draw_mixed(draw: Draw) -> dict[str, Any]:
    return {**draw_system(draw), "beta": BETA.draw(draw), "logit_scale": SCALE.draw(draw)}


def _check_weights(arguments: dict[str, Any], results: Tensors) -> None:
    """Of a W_dis: one number in [0, 1] for each edge, the same in both directions."""
    value, given = results["value"], arguments["graph"]
    _expect(value.shape == given.weight.shape and value.dtype == given.dtype, f"{value.dtype} {list(value.shape)}")
    _expect(bool(((value >= 0) & (value <= 1 + 1e-6)).all()), "W_dis leaves [0, 1]")
    _expect(torch.allclose(value, value[given.reverse], rtol=1e-5), "W_dis is not symmetric")


def _draw_oracle(draw: Draw) -> dict[str, Any]:
    nodes = draw(st.integers(0, 2 * MOST_NODES))
    labels = v.classes(draw, (nodes,), 3) - 1 if draw(st.booleans()) else None
    true_labels = v.classes(draw, (nodes,), draw(st.integers(1, 3)))
    fraction = SHARE.draw(draw)
    return {"graph": draw_graph(draw, nodes), "true_labels": true_labels, "fraction": fraction, "labels": labels}


def _seeded(function: Callable[..., Any], **arguments: Any) -> Any:
    return function(**arguments, generator=torch.Generator().manual_seed(0))


def _check_oracle(arguments: dict[str, Any], results: Tensors) -> None:
    _check_weights(arguments, results)
    given, true_labels = arguments["graph"], torch.as_tensor(arguments["true_labels"])
    rows, col = given.rows, given.col.long()
    between = true_labels[rows] != true_labels[col]
    if arguments["labels"] is not None:
        labels = torch.as_tensor(arguments["labels"])
        between &= (labels[rows] < 0) | (labels[col] < 0)
    count = round(float(arguments["fraction"]) * int(between.sum() // 2))
    _expect(int(results["value"].sum()) == 2 * count, "the number of dissimilar edges")
    _expect(not bool((results["value"][~between] != 0).any()), "an edge within a class is dissimilar")


def _draw_shuffled(draw: Draw) -> dict[str, Any]:
    given = draw_graph(draw, draw(st.integers(0, 2 * MOST_NODES)))
    return {"graph": given, "dissimilarity": _draw_dissimilarity(draw, given)}


def _draw_dissimilarity(draw: Draw, given: Graph) -> Tensor:
    linked = torch.zeros(given.num_nodes, given.num_nodes, dtype=torch.bool)
    linked[given.rows, given.col.long()] = True
    values = symmetric(draw, linked, given.dtype)[given.rows, given.col.long()]
    return v.layout(draw, values, without=("expanded",))


def _check_shuffled(arguments: dict[str, Any], results: Tensors) -> None:
    value, given = results["value"], arguments["graph"]
    once = given.rows <= given.col
    before = arguments["dissimilarity"].to(given.dtype)[once].sort().values
    _expect(before.equal(value[once].sort().values), "other weights than before")
    _expect(value.equal(value[given.reverse]), "not symmetric")


def _check_mutual(arguments: dict[str, Any], results: Tensors) -> None:
    _check_weights(arguments, results)
    _expect(results["value"].bool().equal(~arguments["graph"].mutual), "not the edges that join no mutual neighbours")


def _draw_mutual(draw: Draw) -> dict[str, Any]:
    nodes = draw(st.integers(0, 2 * MOST_NODES))
    linked = draw_linked(draw, nodes)
    arrays = csr(linked)
    weight = symmetric(draw, linked, v.dtype(draw, v.WIDE_FLOATS))[linked]
    mutual_entries = draw_linked(draw, nodes)[linked]
    return {"graph": Graph(arrays["crow"], arrays["col"], weight, mutual=mutual_entries)}


def _draw_damping(draw: Draw) -> dict[str, Any]:
    arguments = draw_system(draw)
    return {**arguments, "dissimilarity": _draw_dissimilarity(draw, arguments["graph"]), "beta": BETA.draw(draw)}


def _check_damping(arguments: dict[str, Any], results: Tensors) -> None:
    given = arguments["graph"].normalized()
    system = _system(arguments | {"graph": given})
    _check_decisions(results, system)
    sums = given.sum_rows(arguments["dissimilarity"].to(given.dtype).double())
    damping = float(arguments["beta"]) * float(sums.mean())
    if damping <= 1e6:
        _check_scores("scores", results["scores"], system.solve(damping=damping), system)


def _draw_lpdr(draw: Draw) -> dict[str, Any]:
    arguments = _draw_damping(draw)
    del arguments["mu_unlabeled"]
    return {**arguments, "rtol": STRICT.draw(draw), "seed": SEED.draw(draw)}


def _check_lpdr(arguments: dict[str, Any], results: Tensors) -> None:
    labels, system = results["pseudo_labels"], _system(arguments | {"mu_unlabeled": 0.0})
    _expect(results["scores"].shape == (len(system.labels), system.classes), "shape of scores")
    labelled = torch.tensor([system.offset[k] > 0 for k in system.component])
    _expect((labels >= 0).equal(labelled), "pseudo-labels where no label is, or none where one is")


def _draw_consistency(draw: Draw) -> dict[str, Any]:
    arguments = draw_system(draw)
    for name in ("mu", "mu_unlabeled", "balance"):
        del arguments[name]
    return {**arguments, "alpha": ALPHA.draw(draw), "rtol": STRICT.draw(draw)}


def _check_consistency(arguments: dict[str, Any], results: Tensors) -> None:
    """(I − α S) F = Y, whose matrix has eigenvalues of 1 − α at least."""
    given, value = arguments["graph"], results["value"].double()
    weight = _dense(given.weight, given)
    degree = weight.sum(axis=1)
    root = np.sqrt(np.where(degree > 0, degree, 1))
    labels = torch.as_tensor(arguments["labels"])
    one_hot = np.zeros(tuple(value.shape))
    one_hot[np.flatnonzero(labels >= 0), labels[labels >= 0].numpy()] = 1
    alpha = float(arguments["alpha"])
    exact = np.linalg.solve(np.eye(len(weight)) - alpha * weight / root / root[:, None], one_hot)
    _expect(bool(np.isfinite(value.numpy()).all()), "not finite")
    error = float(np.abs(value.numpy() - exact).max(initial=0))
    _expect(error <= 0.01 * float(np.abs(exact).max()), f"off by {error:.2g}")


SHARE = Number((0.5, 0, 1, 0.9), least=0, most=1)
SEED = Number((0, 1), integer=True)
ALPHA = Number((0.99, 0.5, 0.9), least=0, most=1, above=True, below=True)
STRICT = Number((1e-8, 1e-10), least=0, above=True)
LPDR = {name: number for name, number in SYSTEM.items() if name not in ("mu_unlabeled", "rtol")}
TARGETS = {
    "graph.label_propagation": Target(
        draw_system,
        partial(converged, graph.label_propagation),
        holds=_check_propagated,
        numbers=SYSTEM,
        shapes=("labels",),
        fixed=("balance",),
        undefined=("rtol", "max_iter"),
    ),
    "graph.mixed_label_propagation": Target(
        _draw_mixed,
        partial(converged, graph.mixed_label_propagation),
        holds=_check_mixed,
        shapes=("labels",),
        numbers={**SYSTEM, "beta": BETA, "logit_scale": SCALE},
        fixed=("balance",),
        undefined=("rtol", "max_iter"),
    ),
    "graph.comparisons.learning_with_local_and_global_consistency": Target(
        _draw_consistency,
        partial(converged, comparisons.learning_with_local_and_global_consistency),
        holds=_check_consistency,
        shapes=("labels",),
        numbers={"num_classes": CLASSES, "alpha": ALPHA, "rtol": STRICT, "max_iter": MAX_ITER},
        undefined=("rtol", "max_iter"),
    ),
    "graph.comparisons.mutual_neighbour_dissimilarity": Target(
        _draw_mutual, comparisons.mutual_neighbour_dissimilarity, holds=_check_mutual
    ),
    "graph.comparisons.control_dissimilarity": Target(
        draw_system,
        partial(converged, comparisons.control_dissimilarity),
        holds=_check_weights,
        numbers=SYSTEM,
        shapes=("labels",),
        fixed=("balance",),
        undefined=("rtol", "max_iter"),
    ),
    "graph.comparisons.oracle_dissimilarity": Target(
        _draw_oracle,
        partial(_seeded, comparisons.oracle_dissimilarity),
        holds=_check_oracle,
        numbers={"fraction": SHARE},
    ),
    "graph.comparisons.shuffled_dissimilarity": Target(
        _draw_shuffled, partial(_seeded, comparisons.shuffled_dissimilarity), holds=_check_shuffled
    ),
    "graph.comparisons.uniform_damping": Target(
        _draw_damping,
        partial(converged, comparisons.uniform_damping),
        holds=_check_damping,
        shapes=("labels",),
        numbers={**SYSTEM, "beta": BETA},
        fixed=("balance",),
        undefined=("rtol", "max_iter"),
    ),
    "graph.comparisons.lpdr": Target(
        _draw_lpdr,
        comparisons.lpdr,
        holds=_check_lpdr,
        shapes=("labels",),
        numbers={**LPDR, "rtol": STRICT, "beta": BETA, "seed": SEED},
        fixed=("balance",),
        undefined=("rtol", "max_iter"),
    ),
}
