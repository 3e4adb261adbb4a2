# SPDX-License-Identifier: BSD-3-Clause
"""Label propagation and mixed label propagation (Zhuang and Moulin, CVPR 2023) as scikit-learn classifiers.

:mod:`ssmkernels.graph` does the work and gives more: graphs made elsewhere, GPUs, float32, dissimilar edges.
"""

from __future__ import annotations

import numbers
import warnings
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse

from ssmkernels.distributed import Group, gather_objects
from ssmkernels.graph import Graph, SplitGraph, knn_graph, propagation
from ssmkernels.graph.parts import AnyGraph, all_columns
from ssmkernels.ops import _checks as check

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError(
        "ssmkernels.estimators needs scikit-learn 1.6 or newer: pip install scikit-learn, or 'ssmkernels[train]'"
    ) from error

__all__ = ["LabelPropagation", "MixedLabelPropagation"]

# Similarities in memory at a time in a prediction; 64 MiB of float64.
_CHUNK_ENTRIES = 2**23
# Cosines as close as this are rounded differently in one matrix product and the next: they count as equal.
_TIE = 1e-12


class LabelPropagation(ClassifierMixin, BaseEstimator):
    """Label propagation on a kNN graph, equation (16): labels flow from few labelled points to the unlabelled ones.

    The affinity of two points is the cosine of their angle to the power ``gamma``, 0 where it is negative; scale and
    origin of the features matter accordingly, and a point at the origin is no one's neighbour. Without unlabelled
    points, it smooths the labels. Computes in float64 on the CPU; a :class:`~sklearn.exceptions.ConvergenceWarning`
    says if ``max_iter`` was not enough.

    Unlabelled points have the label -1 in y. Where labels are strings, y is of dtype object and -1 the integer, or
    None, NaN or pandas.NA stands there; the string "-1" is refused, as it might be either a class or the mark.

    Points that no label reaches (in a component of the graph without labels, or without a positive score) have the
    shares of the classes among the labels for a distribution, and so the most frequent class. So have new points
    without a positive affinity to a training point.

    Args:
        n_neighbors: k ≥ 1 of the graph, and of the training points that a new point is judged by; N − 1 where it is
            more.
        affinity: ``"cosine"``, the graph of the k nearest neighbours, or ``"precomputed"``: X is the graph, a symmetric
            matrix [N, N] of weights ≥ 0, sparse or dense, a :class:`~ssmkernels.graph.Graph`, or this rank's part of
            one, a :class:`~ssmkernels.graph.SplitGraph`; and a matrix [M, N] where new points are judged. Its diagonal
            counts nowhere; ``n_neighbors`` and ``gamma`` are not used then.
        gamma: > 0, exponent of the affinity (15).
        mu: > 0, how strongly labelled points keep their label, in the unit of the affinities.
        mu_unlabeled: ≥ 0, how strongly unlabelled points are drawn to no label; ``mu`` for equation (12).
        balance: give every class of a component the same weight, however many labels it has.
        rtol: > 0, relative tolerance of conjugate gradients; None for 1e-8.
        max_iter: ≥ 1, iterations of conjugate gradients.

    Attributes:
        classes_: [C] the labels there are, sorted.
        label_distributions_: [N, C] scores of the training points, those below 0 as 0, rows summing to 1. Of label
            propagation, with a ``mu`` that is small beside the degrees of the graph, they are close to uniform; their
            order is what counts.
        transduction_: [N] the class of each training point: the largest of its row above.
        confidence_: [N] in [0, 1], equation (21) of the distribution; 0 where no label reaches.
        n_iter_: iterations of conjugate gradients.
        n_features_in_: d; N where the affinity is precomputed.
        feature_names_in_: [d], where X had names of columns.
    """

    classes_: np.ndarray
    label_distributions_: np.ndarray
    transduction_: np.ndarray
    confidence_: np.ndarray
    n_iter_: int
    _is_split: bool
    _prior: np.ndarray  # [C] shares of the classes among the labels
    # [N, d] training points, of length 1: an array, a scipy.sparse one, or None where the affinity is precomputed
    _directions: Any

    def __init__(
        self,
        n_neighbors: int = 50,
        *,
        affinity: Literal["cosine", "precomputed"] = "cosine",
        gamma: float = 3.0,
        mu: float = 1 / 99,
        mu_unlabeled: float = 0.0,
        balance: bool = True,
        rtol: float | None = None,
        max_iter: int = 1000,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.affinity = affinity
        self.gamma = gamma
        self.mu = mu
        self.mu_unlabeled = mu_unlabeled
        self.balance = balance
        self.rtol = rtol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any) -> LabelPropagation:
        """Propagates the labels y [N], -1 where there is none, over the points X [N, d], dense or sparse, or the graph
        X [N, N], a matrix or a :class:`~ssmkernels.graph.Graph`. Of a :class:`~ssmkernels.graph.SplitGraph` y has the
        labels of this rank's rows, of which are the results too; every rank calls.

        Raises:
            ValueError: X is not finite, has a single row or is no graph, y has labels of fewer than two classes or no
                classes at all (numbers that are not whole), or a parameter is out of range; the message says which.
        """
        y = _with_missing_marked(y)
        if isinstance(X, (Graph, SplitGraph)) and self.affinity != "precomputed":
            kind = type(X).__name__
            raise ValueError(f"X is a {kind}, which needs affinity='precomputed', got {self.affinity!r}")
        if isinstance(X, SplitGraph):
            classes, codes, counts = _encode_of_ranks(column_or_1d(y), X.group)
            self.n_features_in_, self._directions = X.num_nodes, None
            return self._fit_graph(self._of_split(X), classes, codes, counts)
        if isinstance(X, Graph):
            X = X.to_scipy()
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, ensure_min_samples=2)
        if isinstance(self.n_neighbors, bool) or not isinstance(self.n_neighbors, (int, np.integer)):
            raise TypeError(f"n_neighbors should be an integer, got {self.n_neighbors!r}")
        if self.n_neighbors < 1:
            raise ValueError(f"n_neighbors should be at least 1, got {self.n_neighbors}")
        if self.affinity not in ("cosine", "precomputed"):
            raise ValueError(f"affinity should be 'cosine' or 'precomputed', got {self.affinity!r}")
        check.check_positive("gamma", self.gamma)
        classes, codes = _encode(y)
        self._directions = None if self.affinity == "precomputed" else _unit_rows(X)
        return self._fit_graph(self._graph(X), classes, codes, np.bincount(codes[codes >= 0]))

    def _fit_graph(
        self, graph: AnyGraph, classes: np.ndarray, codes: np.ndarray, counts: np.ndarray
    ) -> LabelPropagation:
        """``codes`` [N] are the labels of the rows that are here, ``counts`` [C] those of all."""
        self.classes_, self._prior = classes, counts / counts.sum()
        self._is_split = isinstance(graph, SplitGraph)
        system = propagation.LabelSystem(
            graph,
            torch.from_numpy(codes),
            num_classes=len(self.classes_),
            **self._settings("mu", "mu_unlabeled", "balance"),
        )
        result = self._propagate(system)
        if system.shortfall:
            warnings.warn(f"{type(self).__name__} {system.shortfall}", ConvergenceWarning, stacklevel=3)
        distributions = all_columns(graph, result.probs).contiguous().numpy()
        distributions[result.pseudo_labels.numpy() < 0] = self._prior
        self.label_distributions_ = distributions
        self.transduction_ = self.classes_[distributions.argmax(axis=1)]
        self.confidence_ = result.confidence.numpy()
        self.n_iter_ = int(all_columns(graph, result.iterations[None]).max())
        return self

    def _of_split(self, split: SplitGraph) -> SplitGraph:
        """In float64; loops count nowhere."""
        return split.with_weight(torch.where(split.col == split.rows, 0, split.weight).double())

    def _graph(self, X: Any) -> Graph:
        if self.affinity != "precomputed":
            directions = self._directions if sparse.issparse(self._directions) else torch.from_numpy(self._directions)
            return knn_graph(directions, min(int(self.n_neighbors), X.shape[0] - 1), gamma=self.gamma)
        _check_affinity(X)
        try:
            return Graph.from_scipy(_without_diagonal(X))
        except ValueError as error:
            raise ValueError(f"X is no precomputed affinity: {error}") from None

    def _propagate(self, system: propagation.LabelSystem) -> Any:
        return system.solve(**self._settings("rtol", "max_iter"))

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.pairwise = self.affinity == "precomputed"
        return tags

    def predict_proba(self, X: Any) -> np.ndarray:
        """[M, C] distributions over ``classes_`` of points X [M, d]: means of those of the ``n_neighbors`` nearest
        training points.

        Nearest by cosine; all that are as near as the last of them count. The weights are the affinities (15). A
        training point is its own nearest neighbour here; what was found for it is in ``label_distributions_``. Where
        the affinity is precomputed, X [M, N] has the weights of all training points.
        """
        check_is_fitted(self)
        if self._is_split:
            raise ValueError(
                "this was fitted on a SplitGraph, whose distributions are on all ranks: it judges no new points"
            )
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        if self._directions is None:
            _check_affinity(X)
        directions = X if self._directions is None else _unit_rows(X)
        size = max(1, _CHUNK_ENTRIES // len(self.label_distributions_))
        chunks = [self._distributions(directions[begin : begin + size]) for begin in range(0, X.shape[0], size)]
        return np.concatenate(chunks)

    def _distributions(self, rows: Any) -> np.ndarray:
        """Of new points by their directions [B, d], or by their weights [B, N]."""
        distributions, prior = torch.from_numpy(self.label_distributions_), torch.from_numpy(self._prior)
        products = rows if self._directions is None else rows @ self._directions.T
        weight = torch.from_numpy(products.toarray() if sparse.issparse(products) else np.ascontiguousarray(products))
        if self._directions is not None:
            k = min(int(self.n_neighbors), weight.shape[1])
            last = weight.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
            weight = torch.where((weight >= last - _TIE) & (weight > _TIE), weight, 0.0) ** float(self.gamma)
        largest = weight.amax(dim=1, keepdim=True)
        weight = weight / torch.where(largest > 0, largest, 1)  # so that the sum neither overflows nor vanishes
        total = weight.sum(dim=1, keepdim=True)
        return torch.where(total > 0, weight @ distributions / total.clamp_min(1), prior).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """[M] the most probable class of points X [M, d]: of :meth:`predict_proba`."""
        distributions = self.predict_proba(X)
        return self.classes_[distributions.argmax(axis=1)]


class MixedLabelPropagation(LabelPropagation):
    """Mixed label propagation on a kNN graph, equations (19)-(24): label propagation, then once more with dissimilar
    edges found by it.

    An edge is dissimilar as far as its two ends confidently get different labels when it is taken away.
    Everything but the two parameters below is as in :class:`LabelPropagation`.

    Args:
        n_neighbors, affinity, gamma, balance, rtol, max_iter: as there.
        mu, mu_unlabeled: likewise, in units of the mean affinity on the graph: the result is the same for affinities c
            times as large.
        beta: ≥ 0, weight of dissimilar edges (24), in the same unit.
        logit_scale: > 0, sharpness λ of the labels (20) that dissimilar edges are judged by.
    """

    def __init__(
        self,
        n_neighbors: int = 50,
        *,
        affinity: Literal["cosine", "precomputed"] = "cosine",
        gamma: float = 3.0,
        beta: float = 1.0,
        logit_scale: float = 4.0,
        mu: float = 1 / 99,
        mu_unlabeled: float = 0.0,
        balance: bool = True,
        rtol: float | None = None,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(
            n_neighbors,
            affinity=affinity,
            gamma=gamma,
            mu=mu,
            mu_unlabeled=mu_unlabeled,
            balance=balance,
            rtol=rtol,
            max_iter=max_iter,
        )
        self.beta = beta
        self.logit_scale = logit_scale

    def _of_split(self, split: SplitGraph) -> SplitGraph:
        return super()._of_split(split).normalized()

    def _graph(self, X: Any) -> Graph:
        return super()._graph(X).normalized()

    def _propagate(self, system: propagation.LabelSystem) -> Any:
        return propagation.mix(system, **self._settings("beta", "logit_scale", "rtol", "max_iter"))


def _with_missing_marked(y: Any) -> Any:
    """y with the integer -1 where a label is missing, if it is of objects or strings; anything else as it is, for
    scikit-learn to judge.

    Of numpy or pandas; pandas has columns of strings and of integers that hold missing values and no -1.
    """
    # An extension type of pandas
    if hasattr(y, "isna") and getattr(y, "ndim", 0) == 1 and not isinstance(y.dtype, np.dtype):
        y = y.astype(object)
    labels = np.asarray(y) if hasattr(y, "dtype") and not sparse.issparse(y) else None
    if labels is None or labels.dtype != object or labels.ndim != 1:
        return y
    missing = np.array([_is_missing(label) for label in labels], dtype=bool)
    return np.where(missing, -1, labels) if missing.any() else y


def _is_missing(label: Any) -> bool:
    """None, NaN or pandas.NA, which is not equal to itself either but does not say so in a bool."""
    return label is None or type(label).__name__ == "NAType" or (isinstance(label, numbers.Real) and label != label)


def _unlabelled(y: np.ndarray) -> np.ndarray:
    """[N] bool."""
    if y.dtype.kind in "UO" and any(isinstance(label, str) and label == "-1" for label in y):
        raise ValueError(
            "y is of strings and holds '-1'; y should be of dtype object, with the integer -1, None or NaN where there"
            " is no label"
        )
    if y.dtype == object:
        return np.array([isinstance(label, numbers.Real) and label == -1 for label in y], dtype=bool)
    return np.zeros(len(y), dtype=bool) if y.dtype.kind == "U" else y == -1


def _encode_of_ranks(y: np.ndarray, group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes [C] on all ranks, which of them each entry of y [n] is, and how many labels each has on all ranks."""
    unlabelled = _unlabelled(y)
    own = y[~unlabelled].tolist()
    labels = [label for of_rank in gather_objects(own, group=group) for label in of_rank]
    classes, places = _encode(np.array(labels, dtype=object))
    codes = np.full(len(y), -1, dtype=np.int64)
    codes[~unlabelled] = np.searchsorted(classes, np.array(own, dtype=classes.dtype))
    return classes, codes, np.bincount(places)


def _encode(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes [C] of y [N], and which of them each entry is: int64 [N], -1 where it is unlabelled."""
    unlabelled = _unlabelled(y)
    labels = y[~unlabelled]
    if len(labels) == 0:
        raise ValueError("y should have labels of at least 2 classes, but all of it is -1 (unlabelled)")
    if labels.dtype == object:
        strings = sum(isinstance(label, str) for label in labels)
        if 0 < strings < len(labels):
            raise ValueError("y should have labels that are all strings or all numbers, got both")
        labels = labels if strings else np.array(labels.tolist())
    # Over the whole length: one label per class is no reason to suspect a regression, as it would be in labels alone.
    filled = np.full(len(y), labels[0], dtype=labels.dtype)
    filled[~unlabelled] = labels
    check_classification_targets(filled)
    classes, class_index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y should have labels of at least 2 classes, got 1 class: {classes[0]!r}")
    codes = np.full(len(y), -1, dtype=np.int64)
    codes[~unlabelled] = class_index
    return classes, codes


def _check_affinity(X: Any) -> None:
    if X.min() < 0:
        raise ValueError("X is no precomputed affinity: it has weights below 0")


def _without_diagonal(X: Any) -> sparse.coo_array:
    """A loop has no part in a Laplacian, and would count in the mean affinity."""
    entries = sparse.coo_array(X)
    kept = entries.row != entries.col
    return sparse.coo_array((entries.data[kept], (entries.row[kept], entries.col[kept])), shape=entries.shape)


def _unit_rows(X: Any) -> Any:
    """Rows of length 1, dense or sparse; those of length 0 as they are."""
    tiny = np.finfo(X.dtype).tiny
    if sparse.issparse(X):
        largest = abs(X).max(axis=1).toarray().reshape(-1, 1)
        scaled = X.multiply(1 / np.maximum(largest, tiny)).tocsr()
        return sparse.csr_array(
            scaled.multiply(1 / np.maximum(np.sqrt(scaled.power(2).sum(axis=1)).reshape(-1, 1), tiny))
        )
    scaled = X / np.maximum(np.abs(X).max(axis=1, keepdims=True), tiny)  # squares neither overflow nor vanish
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), tiny)
